"""The front of a study as a Plotly figure: every trial in its group, with intervals, and those without a value."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dse.pareto.dominance import non_dominated
from dse.pareto.knee import knee_index
from dse.pareto.objective import directions_of
from dse.report.dashboard.axis_values import AxisChoice, AxisValues, axis_values
from dse.report.dashboard.snapshot import StudySnapshot
from dse.report.dashboard.theme import THEMES, Theme, axis, colour_scale, frame
from dse.report.dashboard.trial_groups import GROUPS, RangeFilter, groups_of, kept_by
from dse.report.trials_table import objective_matrix
from dse.report.units import percent

__all__ = ["FrontView", "front_plot", "plotted_trials"]

Mask = npt.NDArray[np.bool_]

_HEIGHT = 560
_MOST_BARS = 150
"""Dominated trials get interval bars up to this many: more would hide the front."""
_MOST_LABELS = 40
_MOST_UNPLACED = 30
"""The last trials without a value on either axis are drawn in a row."""


@dataclass(frozen=True)
class FrontView:
    """What the reader chose.

    Attributes:
        x: Horizontal axis.
        y: Vertical axis.
        colour: Axis that colours the front; None for one colour.
        relative: Whether values are relative to dense.
        filters: Ranges; trials outside are drawn pale.
        theme: `light` or `dark`.
        first: Trial chosen as A; None without one.
        second: Trial chosen as B.
    """

    x: AxisChoice
    y: AxisChoice
    colour: AxisChoice | None = None
    relative: bool = False
    filters: Sequence[RangeFilter] = ()
    theme: str = "light"
    first: int | None = None
    second: int | None = None


def plotted_trials(snapshot: StudySnapshot) -> pd.DataFrame:
    """The trials table with the pending trials at its end, of which only exact costs are known."""
    table, pending = snapshot.trials, snapshot.pending
    if not pending:
        return table
    names = ["trial", "state", "feasible", "point_id", "origin", "reason", "decomposed_tensors", "reduction"]
    names += [entry.name for entry in snapshot.objectives]
    if table.empty:
        table = pd.DataFrame({name: pd.Series(dtype=object) for name in [*names, "on_front", "tied_with"]})
    count = len(table)
    grown = table.reset_index(drop=True).reindex(range(count + len(pending)))
    for column in ("feasible", "on_front"):
        grown[column] = [*table[column].tolist(), *([column == "feasible"] * len(pending))]
    columns: dict[str, list[Any]] = {
        "trial": [entry.trial for entry in pending],
        "state": [entry.state for entry in pending],
        "point_id": [entry.point_id for entry in pending],
        "origin": [entry.origin for entry in pending],
    }
    for name in dict.fromkeys(name for entry in pending for name in entry.known):
        columns[name] = [entry.known.get(name, math.nan) for entry in pending]
    for name, values in columns.items():
        before = table[name].tolist() if name in table.columns else [math.nan] * count
        grown[name] = [*before, *values]
        if name in pending[0].known:
            grown[name] = pd.to_numeric(grown[name])
    return grown


def front_plot(snapshot: StudySnapshot, view: FrontView) -> dict[str, Any]:
    """The figure as a Plotly dictionary; the number and order of its traces are the same for every study and view."""
    drawing = _Drawing.of(snapshot, view)
    return {"data": drawing.traces(), "layout": drawing.layout()}


@dataclass(frozen=True, eq=False)
class _Limits:
    """Extent of an axis. Trials without a value lie in a strip before its low end.

    Attributes:
        low: Low end of the values.
        high: High end.
        has_strip: Whether trials lie in the strip.
        has_second: Whether a second strip holds trials without a value on either axis.
    """

    low: float
    high: float
    has_strip: bool
    has_second: bool = False

    @classmethod
    def of(cls, values: AxisValues, shown: Mask, front: Mask, has_strip: bool, has_second: bool = False) -> _Limits:
        """The extent of the values, and of the intervals of the front unless they are much wider, with a margin."""
        inside = values.value[shown & np.isfinite(values.value)]
        if inside.size == 0:
            return cls(0.0, 1.0, has_strip, has_second)
        low, high = float(inside.min()), float(inside.max())
        most = 0.6 * (high - low)
        ends = [column[front & np.isfinite(column)] for column in (values.low, values.high)]
        if ends[0].size and most > 0:
            low, high = max(min(low, ends[0].min()), low - most), min(max(high, ends[1].max()), high + most)
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, has_strip, has_second)

    @property
    def strip(self) -> float:
        """Coordinate of the trials in the strip."""
        return self.low - 0.05 * (self.high - self.low)

    @property
    def second_strip(self) -> float:
        """Coordinate of the trials without a value on either axis."""
        return self.low - (0.05 + 0.1 * self.has_strip) * (self.high - self.low)

    @property
    def range(self) -> list[float]:
        """The range of the axis, the strips included."""
        return [self.low - 0.1 * (self.high - self.low) * (self.has_strip + self.has_second), self.high]


@dataclass(frozen=True, eq=False)
class _Drawing:
    snapshot: StudySnapshot
    view: FrontView
    theme: Theme
    trials: pd.DataFrame
    numbers: np.ndarray
    x: AxisValues
    y: AxisValues
    groups: Mapping[str, Mask]
    kept: Mask
    hover: list[str]
    across: _Limits
    upward: _Limits

    @classmethod
    def of(cls, snapshot: StudySnapshot, view: FrontView) -> _Drawing:
        trials, groups, hover = _prepared(snapshot)
        count = len(trials)
        x, y = (axis_values(trials, entry, relative=view.relative) for entry in (view.x, view.y))
        has_x, has_y = np.isfinite(x.value), np.isfinite(y.value)
        shown, front = np.logical_or.reduce(list(groups.values())), groups["front"] | groups["dense"]
        return cls(
            snapshot,
            view,
            THEMES[view.theme],
            trials,
            trials["trial"].to_numpy(dtype=int) if count else np.zeros(0, dtype=int),
            x,
            y,
            groups,
            kept_by(trials, view.filters),
            hover,
            _Limits.of(x, shown & (has_x | has_y), front, bool((shown & has_y & ~has_x).any())),
            _Limits.of(
                y,
                shown & (has_x | has_y),
                front,
                bool((shown & has_x & ~has_y).any()),
                bool((shown & ~has_x & ~has_y).any()),
            ),
        )

    @property
    def placed(self) -> Mask:
        """Trials with a value on at least one axis."""
        return np.asarray(np.isfinite(self.x.value) | np.isfinite(self.y.value))

    @property
    def measured(self) -> Mask:
        """Trials with a value on both axes."""
        return np.asarray(np.isfinite(self.x.value) & np.isfinite(self.y.value))

    def traces(self) -> list[dict[str, Any]]:
        """The traces, from the lowest layer to the highest."""
        theme = self.theme
        many = int(self.groups["dominated"].sum()) > _MOST_BARS
        hollow = {"color": theme.surface, "size": 10, "line": {"color": theme.front, "width": 2}}
        diamond = {"color": theme.dense, "size": 14, "symbol": "diamond", "line": {"color": theme.surface, "width": 1.5}}
        cross = {"color": theme.failed, "size": 8, "symbol": "x-thin", "line": {"color": theme.failed, "width": 2.2}}
        return [
            self._outside(),
            self._group("dominated", {"color": theme.trials, "size": 7}, None if many else theme.bars),
            self._staircase(),
            self._group("stopped", {"color": theme.muted, "size": 9, "symbol": "triangle-down-open"}, theme.bars),
            self._group("infeasible", {"color": theme.muted, "size": 8, "symbol": "square-open"}, None),
            self._group("failed", cross, None),
            self._group("pending", {"color": theme.pending, "size": 11, "symbol": "hourglass"}, None),
            self._group("tied", hollow, theme.front_bars),
            self._front(),
            self._group("dense", diamond, theme.dense),
            self._knee(),
            self._chosen("A", self.view.first),
            self._chosen("B", self.view.second),
        ]

    def _group(self, name: str, marker: dict[str, Any], bars: str | None) -> dict[str, Any]:
        trace = self._scatter(self.groups[name] & self.kept, GROUPS[name], marker)
        if bars is not None:
            rows = self._rows(self.groups[name] & self.kept)
            trace |= {"error_x": _bars(self.x, rows, bars), "error_y": _bars(self.y, rows, bars)}
        return trace

    @property
    def unplaced(self) -> np.ndarray:
        """The last trials without a value on either axis."""
        shown = np.logical_or.reduce(list(self.groups.values()))
        return np.flatnonzero(shown & self.kept & ~self.placed)[-_MOST_UNPLACED:]

    def _rows(self, member: Mask) -> np.ndarray:
        """Trials of a group that are drawn."""
        drawn = self.placed.copy()
        drawn[self.unplaced] = True
        return np.flatnonzero(member & drawn)

    def _scatter(self, member: Mask, name: str, marker: dict[str, Any]) -> dict[str, Any]:
        """A group; trials without a value lie in the strips, those without any in a row of their own."""
        rows = self._rows(member)
        x, y = self.x.value[rows], self.y.value[rows]
        nowhere = np.isnan(x) & np.isnan(y)
        row_places = self.across.low + (self.across.high - self.across.low) * 0.028 * (
            0.6 + np.searchsorted(self.unplaced, rows)
        )
        x = np.where(nowhere, row_places, x)
        y = np.where(nowhere, self.upward.second_strip, y)
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": np.where(np.isfinite(x), x, self.across.strip).tolist(),
            "y": np.where(np.isfinite(y), y, self.upward.strip).tolist(),
            "marker": marker,
            "hovertext": [self.hover[row] for row in rows],
            "hoverinfo": "text",
            "customdata": self.numbers[rows].tolist(),
            "showlegend": bool(len(rows)),
            "cliponaxis": True,
        }

    def _outside(self) -> dict[str, Any]:
        shown = np.logical_or.reduce(list(self.groups.values()))
        marker = {"color": self.theme.trials, "size": 5, "opacity": 0.28}
        return self._scatter(shown & ~self.kept, "Outside the ranges", marker)

    def _staircase(self) -> dict[str, Any]:
        """The front of the two axes alone, over feasible trials."""
        complete = [self.groups[name] for name in ("front", "dense", "tied", "dominated")]
        eligible = np.logical_or.reduce(complete) & self.measured & self.kept
        plane = np.column_stack([self.x.value, self.y.value])[eligible]
        directions = [self.x.choice.objective.direction, self.y.choice.objective.direction]
        steps = np.unique(plane[non_dominated(plane, directions)], axis=0) if len(plane) else plane
        return {
            "type": "scatter",
            "mode": "lines",
            "name": "Front of these two axes",
            "x": steps[:, 0].tolist(),
            "y": steps[:, 1].tolist(),
            "line": {
                "color": self.theme.front,
                "width": 1.5,
                "shape": "hv" if directions[0] == "minimize" else "vh",
            },
            "opacity": 0.75,
            "hoverinfo": "skip",
            "showlegend": len(steps) > 1,
        }

    def _front(self) -> dict[str, Any]:
        line = {"color": self.theme.surface, "width": 1.5}
        marker: dict[str, Any] = {"size": 12, "color": self.theme.front, "line": line}
        rows = self._rows(self.groups["front"] & self.kept)
        if self.view.colour is not None and len(rows):
            colour = axis_values(self.trials, self.view.colour, relative=self.view.relative)
            marker |= {
                "color": [value if math.isfinite(value) else None for value in colour.value[rows].tolist()],
                "colorscale": colour_scale(self.theme.ramp),
                "showscale": True,
                "colorbar": {
                    "title": {"text": html.escape(colour.short_title), "side": "right", "font": {"size": 12}},
                    "tickfont": {"size": 11, "color": self.theme.muted},
                    "thickness": 10,
                    "outlinewidth": 0,
                },
            }
        trace = self._group("front", marker, self.theme.front_bars)
        if len(rows) <= _MOST_LABELS:
            up = "top" if self.y.choice.objective.direction == "maximize" else "bottom"
            side = "left" if self.x.choice.objective.direction == "minimize" else "right"
            trace |= {
                "mode": "markers+text",
                "text": [str(number) for number in self.numbers[rows]],
                "textposition": f"{up} {side}",
                "textfont": {"size": 11, "color": self.theme.text},
            }
        return trace

    def _knee(self) -> dict[str, Any]:
        member = np.zeros(len(self.trials), dtype=bool)
        objectives = self.snapshot.objectives
        if len(objectives) > 1 and len(self.trials) and self.groups["front"].sum() > 2:
            found = knee_index(
                objective_matrix(self.trials, objectives), directions_of(objectives), ~self.groups["dense"]
            )
            if found is not None:
                member[found] = True
        ring = {"color": "rgba(0,0,0,0)", "size": 21, "line": {"color": self.theme.text, "width": 1.5}}
        return {**self._scatter(member & self.kept, "Knee", ring), "hoverinfo": "skip"}

    def _chosen(self, letter: str, trial: int | None) -> dict[str, Any]:
        member = self.numbers == (-1 if trial is None else trial)
        marker = {"color": "rgba(0,0,0,0)", "size": 18, "symbol": "square", "line": {"color": self.theme.text, "width": 2}}
        return {
            **self._scatter(member, f"Chosen {letter}", marker),
            "mode": "markers+text",
            "text": [f"<b>{letter}</b>"] * len(self._rows(member)),
            "textposition": "bottom right" if letter == "A" else "top right",
            "textfont": {"size": 14, "color": self.theme.text},
            "showlegend": False,
            "hoverinfo": "skip",
        }

    def layout(self) -> dict[str, Any]:
        """Axes with their strips, and the legend above the plot."""
        theme = self.theme
        shapes: list[dict[str, Any]] = []
        notes: list[dict[str, Any]] = []
        note = {"showarrow": False, "font": {"size": 11, "color": theme.muted}}
        band = {"type": "rect", "fillcolor": theme.grid, "line": {"width": 0}, "layer": "below", "opacity": 0.7}
        rows = [(self.upward.has_strip, self.upward.strip, f"no {html.escape(self.y.choice.label.lower())} yet")]
        rows.append((self.upward.has_second, self.upward.second_strip, "no value on either axis"))
        for is_used, place, text in rows:
            if is_used:
                half = 0.045 * (self.upward.high - self.upward.low)
                ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": place - half, "y1": place + half}
                shapes.append({**band, **ends})
                notes.append({**note, "text": text, "xref": "paper", "x": 0.995, "xanchor": "right", "y": place})
        if self.across.has_strip:
            half = 0.045 * (self.across.high - self.across.low)
            ends = {"yref": "paper", "y0": 0, "y1": 1, "x0": self.across.strip - half, "x1": self.across.strip + half}
            shapes.append({**band, **ends})
            text = f"no {html.escape(self.x.choice.label.lower())} yet"
            below = {"yref": "paper", "y": 0, "yanchor": "top", "yshift": -26, "x": self.across.strip}
            notes.append({**note, "text": text, **below})
        if not self.placed.any():
            text = "No trial has a value on these axes yet. The page follows the study by itself."
            font = {"size": 14, "color": theme.muted}
            notes.append({**note, "text": text, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.6, "font": font})
        return frame(
            theme,
            _HEIGHT,
            margin={"l": 64, "r": 16, "t": 84, "b": 52},
            xaxis=axis(theme, html.escape(self.x.title), range=self.across.range),
            yaxis=axis(theme, html.escape(self.y.title), range=self.upward.range),
            legend={"orientation": "h", "x": 0, "y": 1.0, "yref": "container", "yanchor": "top", "font": {"size": 12}},
            shapes=shapes,
            annotations=notes,
            dragmode="zoom",
            uirevision=f"{self.view.x.key} {self.view.y.key} {self.view.relative}",
        )


@functools.lru_cache(maxsize=4)
def _prepared(snapshot: StudySnapshot) -> tuple[pd.DataFrame, dict[str, Mask], list[str]]:
    """Table, groups and hover texts, which every view of a snapshot shares."""
    trials = plotted_trials(snapshot)
    groups = groups_of(trials)
    state = trials["state"].to_numpy() if len(trials) else np.zeros(0, dtype=object)
    groups["pending"] = np.isin(state, ("running", "queued"))
    return trials, groups, hover_texts(snapshot, trials)


def _bars(values: AxisValues, rows: np.ndarray, colour: str) -> dict[str, Any]:
    down = np.nan_to_num(np.clip(values.value[rows] - values.low[rows], 0.0, None))
    up = np.nan_to_num(np.clip(values.high[rows] - values.value[rows], 0.0, None))
    if not (down.any() or up.any()):
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": up.tolist(),
        "arrayminus": down.tolist(),
        "color": colour,
        "thickness": 1,
        "width": 0,
        "visible": True,
    }


def hover_texts(snapshot: StudySnapshot, trials: pd.DataFrame) -> list[str]:
    """One text per trial, escaped, since Plotly interprets some HTML in hover labels."""
    if trials.empty:
        return []
    choices = [AxisChoice(entry.name, entry.label, entry, True) for entry in snapshot.objectives]
    plain = [axis_values(trials, choice, relative=False) for choice in choices]
    against = [axis_values(trials, choice, relative=True) for choice in choices]
    reduction = pd.to_numeric(trials["reduction"], errors="coerce").to_numpy(dtype=float)
    texts = []
    for row, (trial, state, point, origin, reason) in enumerate(
        zip(*(trials[name].tolist() for name in ("trial", "state", "point_id", "origin", "reason")), strict=True)
    ):
        lines = [f"<b>Trial {int(trial)}</b>  {html.escape(str(point))}", f"{state}, {percent(reduction[row])} removed"]
        for absolute, relative in zip(plain, against, strict=True):
            value = absolute.value[row]
            if math.isfinite(value):
                change = f"  ({relative.text(relative.value[row])})" if relative.is_relative else ""
                mark = "estimate " if absolute.is_estimate[row] else ""
                lines.append(f"{absolute.choice.label.lower()} {mark}{absolute.text(value)}{change}")
        lines.append(f"proposed by {html.escape(str(origin))}")
        if isinstance(reason, str) and reason and state != "complete":
            lines.append(html.escape(reason[:90]))
        texts.append("<br>".join(lines))
    return texts
