"""A sensitivity profile as a heat map: layers down, roles across, then whole blocks."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from dse.design_point import REMOVED
from dse.report.palette import Palette, colour_of
from dse.sensitivity.sensitivity_profile import MeasuredPart, SensitivityProfile

__all__ = ["HeatMap", "heat_map_html", "heat_map_of"]

_WHITE_TEXT_FROM = 0.45
_BLOCK_ROLES = ("attention", "mlp")


@dataclass(frozen=True)
class HeatMap:
    """Positive values by row and column, coloured on a logarithmic scale.

    Attributes:
        title: One line.
        rows: Labels, top to bottom.
        columns: Labels, left to right.
        values: One tuple per row; None for an empty cell.
        label: The quantity with its unit.
        note: How to read the map, in one or two sentences.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    label: str
    note: str

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest positive value; (0.1, 1) if there is none."""
        known = [value for row in self.values for value in row if value is not None and value > 0]
        if not known:
            return (0.1, 1.0)
        return (min(known), max(max(known), 1.0001 * min(known)))

    def share(self, value: float) -> float:
        """Position of a value between the limits on the logarithmic scale, 0 to 1."""
        low, high = self.limits
        if value <= low:
            return 0.0
        return min(1.0, math.log(value / low) / math.log(high / low))


def heat_map_of(profile: SensitivityProfile) -> HeatMap:
    """Divergence caused by decomposing each tensor alone, and by removing each block.

    A cell measured with several methods shows the lowest value.
    """
    layers = sorted({part.layer for part in profile.parts})
    cells: dict[tuple[str, int], float] = {}
    for part in profile.parts:
        if (column := _column(part)) is not None:
            at = (column, part.layer)
            cells[at] = min(part.divergence, cells.get(at, part.divergence))
    columns = tuple(dict.fromkeys(column for column, _ in cells))
    ratios = sorted(part.parameter_ratio for part in profile.parts if part.role not in _BLOCK_ROLES)
    share = f"about {100 * ratios[len(ratios) // 2]:.0f} %" if ratios else "a part"
    methods = profile.origin.methods
    better = " (the better of the two)" if len(methods) == 2 else " (the best of them)" if len(methods) > 2 else ""
    removed = " Columns ending in 'removed' show whole blocks removed." if any("removed" in c for c in columns) else ""
    return HeatMap(
        title=f"Sensitivity of {profile.model}",
        rows=tuple(str(layer) for layer in layers),
        columns=columns,
        values=tuple(tuple(cells.get((column, layer)) for column in columns) for layer in layers),
        label="KL divergence from dense, nats per token",
        note=(
            f"One tensor decomposed at a time, keeping {share} of its parameters, by {' or '.join(methods)}{better}."
            f" Measured on {profile.origin.tokens} tokens of {profile.text}, in {profile.origin.dtype}.{removed}"
        ),
    )


def _column(part: MeasuredPart) -> str | None:
    if part.method == REMOVED:
        return f"{part.role} removed"
    return None if part.role in _BLOCK_ROLES else part.role


def heat_map_html(heat_map: HeatMap) -> str:
    """A self-contained HTML page; all text is escaped."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in heat_map.columns)
    body = "".join(
        f"<tr><th>{html.escape(row)}</th>{''.join(_cell(heat_map, value) for value in values)}</tr>\n"
        for row, values in zip(heat_map.rows, heat_map.values, strict=True)
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(heat_map.title)}</title>\n<style>{_STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(heat_map.title)}</h1>\n<p>{html.escape(heat_map.label)}. {html.escape(heat_map.note)}</p>\n"
        f"<table><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table></body></html>\n"
    )


def _cell(heat_map: HeatMap, value: float | None) -> str:
    if value is None:
        return "<td></td>"
    share = heat_map.share(value)
    text = "white" if share > _WHITE_TEXT_FROM else Palette.TEXT
    return f'<td style="background:{colour_of(share)};color:{text}">{value:.4f}</td>'


_STYLE = (
    "body{font:15px Inter,'Segoe UI',Roboto,Arial,sans-serif;margin:2em;color:" + Palette.TEXT + "}"
    "h1{font-size:1.25em}p{max-width:60em;color:" + Palette.MUTED + "}table{border-collapse:collapse}"
    "td,th{padding:.22em .7em;text-align:right;font-variant-numeric:tabular-nums;font-weight:normal}"
    "thead th{font-weight:600}"
)
