"""The front of a study as a Plotly figure: every trial in its group, with intervals, and those without a value."""

from __future__ import annotations

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
from dse.report.trials_table import number, objective_matrix
from dse.report.units import percent

__all__ = ["FrontView", "front_plot", "plotted_trials"]

Mask = npt.NDArray[np.bool_]

_HEIGHT = 520
_MOST_BARS = 150
"""Dominated trials get interval bars up to this many: more would hide the front."""
_MOST_LABELS = 40
_STRIP, _STRIP_GAP = 0.05, 0.045  # shares of the plot


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
    return grown


def front_plot(snapshot: StudySnapshot, view: FrontView) -> dict[str, Any]:
    """The figure as a Plotly dictionary; the number and order of its traces are the same for every study and view."""
    drawing = _Drawing.of(snapshot, view)
    return {"data": drawing.traces(), "layout": drawing.layout()}


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

    @classmethod
    def of(cls, snapshot: StudySnapshot, view: FrontView) -> _Drawing:
        trials = plotted_trials(snapshot)
        groups = groups_of(trials)
        state = trials["state"].to_numpy() if len(trials) else np.zeros(0, dtype=object)
        groups["pending"] = np.isin(state, ("running", "queued"))
        return cls(
            snapshot,
            view,
            THEMES[view.theme],
            trials,
            trials["trial"].to_numpy(dtype=int) if len(trials) else np.zeros(0, dtype=int),
            axis_values(trials, view.x, relative=view.relative),
            axis_values(trials, view.y, relative=view.relative),
            groups,
            kept_by(trials, view.filters),
            hover_texts(snapshot, trials),
        )

    @property
    def has_x(self) -> Mask:
        return np.isfinite(self.x.value)

    @property
    def has_y(self) -> Mask:
        return np.isfinite(self.y.value)

    @property
    def shown(self) -> Mask:
        """Trials that belong to a group."""
        return np.logical_or.reduce(list(self.groups.values())) if len(self.trials) else np.zeros(0, dtype=bool)

    @property
    def below(self) -> Mask:
        """Trials with a value on the horizontal axis alone."""
        return self.shown & self.has_x & ~self.has_y

    @property
    def beside(self) -> Mask:
        """Trials with a value on the vertical axis alone."""
        return self.shown & ~self.has_x & self.has_y

    def traces(self) -> list[dict[str, Any]]:
        theme = self.theme
        many = int(self.groups["dominated"].sum()) > _MOST_BARS
        hollow = {"color": theme.surface, "size": 10, "line": {"color": theme.front, "width": 2}}
        diamond = {"color": theme.dense, "size": 14, "symbol": "diamond", "line": {"color": theme.surface, "width": 1.5}}
        cross = {"color": theme.failed, "size": 9, "symbol": "x-thin", "line": {"color": theme.failed, "width": 2.2}}
        return [
            self._outside(),
            self._group("dominated", {"color": theme.trials, "size": 7}, None if many else theme.bars),
            self._staircase(),
            self._group("stopped", {"color": theme.muted, "size": 9, "symbol": "triangle-down-open"}, theme.bars),
            self._group("infeasible", {"color": theme.muted, "size": 8, "symbol": "square-open"}, None),
            self._group("failed", cross, None),
            self._group("pending", {"color": theme.pending, "size": 12, "symbol": "hourglass"}, None),
            self._group("tied", hollow, theme.front_bars),
            self._front(),
            self._group("dense", diamond, theme.dense),
            self._knee(),
            self._chosen("A", self.view.first),
            self._chosen("B", self.view.second),
        ]

    def _group(self, name: str, marker: dict[str, Any], bars: str | None) -> dict[str, Any]:
        member = self.groups[name] & self.kept
        trace = self._scatter(member, GROUPS[name], marker)
        if bars is not None:
            rows = np.flatnonzero(member & self.has_x & self.has_y)
            trace["error_x"], trace["error_y"] = _bars(self.x, rows, bars), _bars(self.y, rows, bars)
        return trace

    def _scatter(self, member: Mask, name: str, marker: dict[str, Any]) -> dict[str, Any]:
        """The trials of a group; those without one of the values lie in the strips below and beside the plot."""
        x, y, axes = self._placed(member)
        rows = np.flatnonzero(member & (self.has_x | self.has_y))
        assert len(x) == len(rows) or True
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": x,
            "y": y,
            "marker": marker,
            "hovertext": [self.hover[row] for row in rows],
            "hoverinfo": "text",
            "customdata": self.numbers[rows].tolist(),
            "showlegend": bool(len(rows)),
            **axes,
        }

    def _placed(self, member: Mask) -> tuple[list[float], list[float], dict[str, str]]:
        rows = np.flatnonzero(member & (self.has_x | self.has_y))
        x, y = self.x.value[rows], self.y.value[rows]
        (left, _), (bottom, _) = self.strips
        return np.where(np.isfinite(x), x, left).tolist(), np.where(np.isfinite(y), y, bottom).tolist(), {}
