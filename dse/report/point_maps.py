"""Maps of points: an SVG figure with layers across, roles down, and the kept share of parameters as colour."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from dse.design_point import WIDTH
from dse.report.explanation import TrialContext, changes_text, origin_text
from dse.report.palette import Palette, colour_of
from dse.report.rank_map import OUTSIDE_LAYERS, PlacedChoice, placed_choices, rank_map_of, rank_map_text
from dse.report.units import percent
from dse.trial_record import TrialRecord

__all__ = ["MAX_MAPS", "MapCell", "PointMap", "map_anchor", "point_map_of", "point_maps_html"]

MAX_MAPS = 40
"""Most maps on a page; one of 32 layers takes about 30 KB."""

_SIDE, _GAP, _LEFT, _TOP = 14, 1, 112, 18  # pixels of a cell and of the margins
_DENSE_FILL, _REMOVED_FILL, _UNKNOWN_FILL = "#e9ecf0", Palette.TEXT, Palette.RAMP[2]
_LEGEND_RATIOS = (0.9, 0.7, 0.5, 0.3, 0.1)
_WIDE_LAYERS = 40
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class MapCell:
    """One layer and role of a map; the default is a dense tensor.

    Attributes:
        method: Decomposition method with its form, `width`, `removed`, or "" if dense.
        rank: Rank of the factors, or channels that the MLP keeps; 0 without either.
        parameter_ratio: Fraction of its parameters that remain; None if unknown.
        stack: Stack that it is decomposed with; "" if none.
    """

    method: str = ""
    rank: int = 0
    parameter_ratio: float | None = 1.0
    stack: str = ""

    @classmethod
    def of(cls, placed: PlacedChoice) -> MapCell:
        """The cell of a decomposed or removed tensor."""
        choice = placed.choice
        return cls(choice.title, choice.rank, placed.parameter_ratio, placed.name if placed.is_stack else "")

    @property
    def is_removed(self) -> bool:
        """Whether its block is removed."""
        return self.method == "removed"

    @property
    def text(self) -> str:
        """`rank 64 by svd, 42.0 % of its parameters`."""
        if not self.method:
            return "dense"
        if self.is_removed:
            return "removed"
        kept = "" if self.parameter_ratio is None else f", {percent(self.parameter_ratio)} of its parameters"
        if self.method == WIDTH:
            return f"MLP of {self.rank} channels{kept}"
        stack = f" as part of {self.stack}" if self.stack else ""
        return f"rank {self.rank} by {self.method}{stack}{kept}"


@dataclass(frozen=True)
class PointMap:
    """The map of one point.

    Attributes:
        trial: Trial number.
        headline: Title line.
        notes: Sentences: its origin and what it changes.
        layers: Labels, left to right.
        roles: Labels, top to bottom.
        cells: One row per role, one cell per layer; None if a layer has no such role.
        ranks: The rank map as lines of text.
    """

    trial: int
    headline: str
    notes: tuple[str, ...]
    layers: tuple[str, ...]
    roles: tuple[str, ...]
    cells: tuple[tuple[MapCell | None, ...], ...]
    ranks: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Decomposition methods in order of appearance."""
        return tuple(dict.fromkeys(c.method for row in self.cells for c in row if c and c.method and not c.is_removed))


def point_map_of(record: TrialRecord, context: TrialContext) -> PointMap:
    """The map of a trial's point."""
    ranks, placed = rank_map_of(record.point, context.shape), placed_choices(record.point, context.shape)
    roles = tuple(dict.fromkeys(role for row in ranks.values() for role in row))

    def cell(layer: int, role: str) -> MapCell | None:
        if (layer, role) in placed:
            return MapCell.of(placed[layer, role])
        return MapCell() if layer != OUTSIDE_LAYERS and role in context.shape["roles"] else None

    notes = [f"Origin: {origin_text(context.origins[record.trial])}."]
    notes += [f"Why: {record.why}."] if record.why else []
    notes += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in changes_text(record.point, context.shape)]
    return PointMap(
        trial=record.trial,
        headline=f"Trial {record.trial}: {percent(float(record.cost['reduction']))} of the parameters removed",
        notes=tuple(notes),
        layers=tuple("other" if layer == OUTSIDE_LAYERS else str(layer) for layer in ranks),
        roles=roles,
        cells=tuple(tuple(cell(layer, role) for layer in ranks) for role in roles),
        ranks=tuple(rank_map_text(ranks)),
    )


def map_anchor(trial: int) -> str:
    """The `id` of a trial's map on the page."""
    return f"map-{trial}"


def point_maps_html(maps: Sequence[PointMap]) -> str:
    """One escaped figure per point, with its ranks as collapsible text; "" without points."""
    if not maps:
        return ""
    shown = maps[:MAX_MAPS]
    wide = " wide" if max(len(entry.layers) for entry in shown) > _WIDE_LAYERS else ""
    more = "" if len(shown) == len(maps) else f" Only the first {len(shown)} of {len(maps)} points are shown."
    note = (
        "Layers run from left to right, roles from top to bottom. The roles of a stack are joined. Letters mark the"
        " methods of points that use several. To reach a map, click a coloured point in the plots or a trial number in"
        f" the table.{more}"
    )
    figures = "\n".join(_figure(entry) for entry in shown)
    return (
        f'<h2>Maps of the front points</h2>\n{_legend()}\n<p class="note">{note}</p>\n'
        f'<div class="maps{wide}">\n{figures}\n</div>'
    )


def _figure(entry: PointMap) -> str:
    anchor = map_anchor(entry.trial)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in entry.notes)
    letters = dict(zip(entry.methods, _LETTERS, strict=False)) if len(entry.methods) > 1 else {}
    key = ", ".join(f"{letter} {method}" for method, letter in letters.items()) or ", ".join(entry.methods)
    text = html.escape("\n".join(entry.ranks))
    ranks = f"<details><summary>Ranks</summary><pre>{text}</pre></details>" if text else ""
    return (
        f'<figure id="{anchor}" tabindex="-1" aria-labelledby="{anchor}-title">'
        f'<h3 id="{anchor}-title">{html.escape(entry.headline)}</h3>\n{_picture(entry, letters)}\n'
        f"<figcaption>{f'<p>{html.escape(key)}</p>' if key else ''}{notes}</figcaption>{ranks}</figure>"
    )


def _picture(entry: PointMap, letters: dict[str, str]) -> str:
    step = _SIDE + _GAP
    width, height = _LEFT + step * len(entry.layers), _TOP + step * len(entry.roles)
    parts = []
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**6) if len(entry.layers) / n <= 20)
    for index, layer in enumerate(entry.layers):
        if index % every == 0:
            x = _LEFT + step * index + _SIDE / 2
            parts.append(f'<text x="{x:g}" y="{_TOP - 6}" text-anchor="middle">{html.escape(layer)}</text>')
    for row, (role, cells) in enumerate(zip(entry.roles, entry.cells, strict=True)):
        y = _TOP + step * row
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 11}" text-anchor="end">{html.escape(role)}</text>')
        below = entry.cells[row + 1] if row + 1 < len(entry.cells) else ()
        for index, cell in enumerate(cells):
            if cell is not None:
                under = below[index] if below else None
                joins = bool(cell.stack) and under is not None and under.stack == cell.stack
                label = f"layer {entry.layers[index]}, {role}: {cell.text}"
                parts.append(_cell(_LEFT + step * index, y, cell, label, joins, letters.get(cell.method, "")))
    label = html.escape(f"Map of trial {entry.trial}, layers by role. " + " ".join(entry.notes), quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" style="max-width:{1.4 * width:.0f}px">'
        f"{''.join(parts)}</svg>"
    )


def _cell(x: int, y: int, cell: MapCell, label: str, joins: bool, letter: str) -> str:
    height = _SIDE + _GAP * joins
    box = f'<rect x="{x}" y="{y}" width="{_SIDE}" height="{height}" fill="{_fill(cell)}"/>'
    if not cell.method:
        return box
    mark = ""
    if cell.is_removed:
        mark = f'<path d="M{x + 4} {y + 4}l6 6m0 -6l-6 6" stroke="#fff" stroke-width="1.5"/>'
    elif letter:
        light = cell.parameter_ratio is not None and cell.parameter_ratio > 0.6
        colour = Palette.TEXT if light else "#fff"
        mark = f'<text x="{x + 7}" y="{y + 10.5}" text-anchor="middle" fill="{colour}">{letter}</text>'
    return f"<g><title>{html.escape(label)}</title>{box}{mark}</g>"


def _fill(cell: MapCell) -> str:
    if not cell.method:
        return _DENSE_FILL
    if cell.is_removed:
        return _REMOVED_FILL
    return _UNKNOWN_FILL if cell.parameter_ratio is None else colour_of(1.0 - cell.parameter_ratio)


def _legend() -> str:
    """Colour key, from dense to removed."""
    swatches = [f'<span><i style="background:{_DENSE_FILL}"></i>dense</span>']
    swatches += [
        f'<span><i style="background:{colour_of(1 - s)}"></i>{percent(s, 0)} kept</span>' for s in _LEGEND_RATIOS
    ]
    cross = f'<i class=gone style="background:{_REMOVED_FILL}">&times;</i>'
    return f'<p class="swatches">{"".join(swatches)}<span>{cross}block removed</span></p>'
