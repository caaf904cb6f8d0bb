"""A point as a picture: layers across, roles down, the share of parameters kept as colour, removed blocks crossed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from dse.report.heat_map import colour_of
from dse.report.panels import Palette
from dse.report.units import percent

__all__ = ["MAP_STYLE", "MOST_MAPS", "MapCell", "PointMap", "map_anchor", "point_maps_html"]

MOST_MAPS = 40
"""Maps on a page: one of 32 layers takes about 30 KB."""

_SIDE, _GAP, _LEFT, _TOP = 14, 1, 112, 18  # pixels of a cell and around the cells
_DENSE_FILL, _REMOVED_FILL, _UNKNOWN_FILL = "#e9ecf0", Palette.TEXT, Palette.RAMP[2]
_WIDE_LAYERS = 40
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class MapCell:
    """What stands at one layer and role; the default is a dense tensor.

    Attributes:
        method: Of its decomposition, `removed`, or "" where it is dense.
        rank: Columns kept; 0 where nothing is decomposed.
        kept: Share of its parameters that are kept; None where it is not known.
        stack: Name of the stack that it is decomposed with; "" for none.
    """

    method: str = ""
    rank: int = 0
    kept: float | None = 1.0
    stack: str = ""

    @property
    def is_removed(self) -> bool:
        """Whether its block is gone."""
        return self.method == "removed"

    @property
    def words(self) -> str:
        """For people: `rank 64 by svd, 42.0 % kept`."""
        if not self.method:
            return "dense"
        if self.is_removed:
            return "removed"
        kept = "" if self.kept is None else f", {percent(self.kept)} kept"
        stack = f" as {self.stack}" if self.stack else ""
        return f"rank {self.rank} by {self.method}{stack}{kept}"


@dataclass(frozen=True)
class PointMap:
    """One point of the front.

    Attributes:
        trial: Its number.
        headline: One line on what it is.
        notes: Sentences: where it comes from, what it does.
        layers: Labels, left to right.
        roles: Labels, top to bottom.
        cells: One row a role, one cell a layer; None where a layer has no such role.
        numbers: The same map as lines of text, with its ranks.
    """

    trial: int
    headline: str
    notes: tuple[str, ...]
    layers: tuple[str, ...]
    roles: tuple[str, ...]
    cells: tuple[tuple[MapCell | None, ...], ...]
    numbers: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that decompose something, in order of appearance."""
        return tuple(dict.fromkeys(c.method for row in self.cells for c in row if c and c.method and not c.is_removed))


def map_anchor(trial: int) -> str:
    """The `id` of a trial's map on the page."""
    return f"map-{trial}"


def point_maps_html(maps: Sequence[PointMap]) -> str:
    """A figure for each point, escaped, with its ranks as text behind a disclosure; "" where there is no point."""
    if not maps:
        return ""
    shown = maps[:MOST_MAPS]
    wide = " wide" if max(len(entry.layers) for entry in shown) > _WIDE_LAYERS else ""
    more = "" if len(shown) == len(maps) else f" These are the first {len(shown)} of {len(maps)} points."
    note = (
        "Layers from left to right, roles from top to bottom. A stack is drawn in one piece. Letters tell methods apart"
        " where a point has several. A click on a coloured point of the plots, or its number in the table, leads to its"
        f" map.{more}"
    )
    figures = "\n".join(_figure(entry) for entry in shown)
    return (
        f'<h2>What the points do</h2>\n{_legend()}\n<p class="note">{note}</p>\n'
        f'<div class="maps{wide}">\n{figures}\n</div>'
    )


def _figure(entry: PointMap) -> str:
    anchor = map_anchor(entry.trial)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in entry.notes)
    letters = dict(zip(entry.methods, _LETTERS, strict=False)) if len(entry.methods) > 1 else {}
    key = ", ".join(f"{letter} {method}" for method, letter in letters.items()) or ", ".join(entry.methods)
    numbers = html.escape("\n".join(entry.numbers))
    ranks = f"<details><summary>Ranks in numbers</summary><pre>{numbers}</pre></details>" if numbers else ""
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
                label = f"layer {entry.layers[index]}, {role}: {cell.words}"
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
        light = cell.kept is not None and cell.kept > 0.6
        colour = Palette.TEXT if light else "#fff"
        mark = f'<text x="{x + 7}" y="{y + 10.5}" text-anchor="middle" fill="{colour}">{letter}</text>'
    return f"<g><title>{html.escape(label)}</title>{box}{mark}</g>"


def _fill(cell: MapCell) -> str:
    if not cell.method:
        return _DENSE_FILL
    if cell.is_removed:
        return _REMOVED_FILL
    return _UNKNOWN_FILL if cell.kept is None else colour_of(1.0 - cell.kept)


def _legend() -> str:
    """Swatches in the order of what they keep."""
    swatches = [f'<span><i style="background:{_DENSE_FILL}"></i>dense</span>']
    swatches += [f'<span><i style="background:{colour_of(1 - s)}"></i>{percent(s, 0)} kept</span>' for s in _LEGEND]
    cross = f'<i class=gone style="background:{_REMOVED_FILL}">&times;</i>'
    return f'<p class="swatches">{"".join(swatches)}<span>{cross}block removed</span></p>'


_LEGEND = (0.9, 0.7, 0.5, 0.3, 0.1)

MAP_STYLE = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 28px 32px;
  margin-top: 18px; }
.maps.wide { grid-template-columns: 1fr; }
figure { margin: 0; padding: 10px 12px; border: 1px solid var(--line); border-radius: 6px; scroll-margin-top: 12px;
  min-width: 0; }
figure:target, figure:focus { outline: 2px solid #2a788e; outline-offset: 1px; }
figure h3 { font-size: 15.5px; margin: 0 0 6px; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-size: 10.5px; fill: var(--muted); }
figcaption { font-size: 13.5px; color: var(--muted); margin-top: 6px; }
figcaption p { margin: 0 0 2px; overflow-wrap: anywhere; }
figcaption p:first-child { color: var(--text); }
details { font-size: 13.5px; margin-top: 6px; }
summary { cursor: pointer; }
details pre { font-size: 11.5px; white-space: pre; overflow-x: auto; margin-top: 6px; }
.swatches { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin: 0; }
.swatches i { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px;
  font-style: normal; text-align: center; line-height: 14px; }
.swatches .gone { color: #fff; }
td a { color: inherit; }
@media print { figure { break-inside: avoid; } }
"""
