"""A table of values as a heat map: the values, and a page that shows them; `png` draws the picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dse.report.panels import Palette

__all__ = ["HeatMap", "heat_map_html"]

_DARK_SHARE = 0.45


@dataclass(frozen=True)
class HeatMap:
    """Positive values by row and column, coloured on a logarithmic scale.

    Attributes:
        title: One line.
        rows: Labels, top to bottom.
        columns: Labels, left to right.
        values: One row of values a row; None where there is none.
        label: Of the values, with their unit.
        note: How to read it, one sentence or two.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    label: str
    note: str

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest positive value; (0.1, 1) where there is none."""
        known = [value for row in self.values for value in row if value is not None and value > 0]
        if not known:
            return (0.1, 1.0)
        return (min(known), max(max(known), 1.0001 * min(known)))

    def share(self, value: float) -> float:
        """Where a value stands between the limits on the logarithmic scale, 0 to 1."""
        low, high = self.limits
        if value <= low:
            return 0.0
        return min(1.0, math.log(value / low) / math.log(high / low))


def heat_map_html(heat_map: HeatMap) -> str:
    """A page that needs nothing but itself; all that comes from outside is escaped."""
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


def colour_of(share: float) -> str:
    """The colour of a share from 0 (pale) to 1 (dark), between the colours of the ramp."""
    ramp = _ramp()
    place = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _ramp() -> Sequence[tuple[int, int, int]]:
    pale = ("#f7fbf5", *reversed(Palette.RAMP))
    return [(int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)) for c in pale]


def _cell(heat_map: HeatMap, value: float | None) -> str:
    if value is None:
        return "<td></td>"
    share = heat_map.share(value)
    text = "white" if share > _DARK_SHARE else Palette.TEXT
    return f'<td style="background:{colour_of(share)};color:{text}">{value:.4f}</td>'


_STYLE = (
    "body{font:15px Inter,'Segoe UI',Roboto,Arial,sans-serif;margin:2em;color:" + Palette.TEXT + "}"
    "h1{font-size:1.25em}p{max-width:60em;color:" + Palette.MUTED + "}table{border-collapse:collapse}"
    "td,th{padding:.22em .7em;text-align:right;font-variant-numeric:tabular-nums;font-weight:normal}"
    "thead th{font-weight:600}"
)
