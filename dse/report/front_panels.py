"""Contents of the front's plots in the shown units; drawn by `front_figure` (Plotly) and `front_png` (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dse.pareto.dominance import FloatArray, non_dominated
from dse.pareto.knee import knee_index
from dse.pareto.objective import REDUCTION, Objective, directions_of, objective_named
from dse.report.trials_table import dense_row, is_predicted, mark_front, numbers, objective_matrix, require_columns
from dse.report.units import Scale, scale_for

__all__ = ["Axis", "Panel", "Points", "front_panels"]


@dataclass(frozen=True)
class Axis:
    """An objective and its unit on the axis; `is_predicted` if some of its values were predicted, not measured."""

    objective: Objective
    scale: Scale
    is_predicted: bool = False

    @property
    def title(self) -> str:
        """Label with unit and direction: `Decode latency (ms), lower is better`."""
        better = "lower is better" if self.objective.direction == "minimize" else "higher is better"
        return f"{self.short_title}, {better}"

    @property
    def short_title(self) -> str:
        """Label with unit, and "predicted" if some of the values were not measured."""
        words = [self.scale.symbol, "predicted" if self.is_predicted else ""]
        note = ", ".join(word for word in words if word)
        return f"{self.objective.label} ({note})" if note else self.objective.label


@dataclass(frozen=True, eq=False)
class Points:
    """Trials of one group in shown units; one entry per trial in each array.

    Attributes:
        rows: Positions in the trials table.
        trials: Trial numbers.
        x, y: Coordinates.
        x_error, y_error: Shape (2, n): distances down and up to the ends of the 95 % interval; NaN if unknown.
        colour: Third objective; None if the study has two.
    """

    rows: np.ndarray
    trials: np.ndarray
    x: FloatArray
    y: FloatArray
    x_error: FloatArray
    y_error: FloatArray
    colour: FloatArray | None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Panel:
    """One plot of two objectives.

    Attributes:
        x, y, colour: Axes; `colour` is the third objective, None if the study has two.
        others: Complete trials that are neither on the front nor tied with it.
        tied: Trials that are tied with the front (see `mark_ties`).
        front: Front points except the dense model.
        dense: The dense model, at most one point.
        knee: The knee of the front, at most one point.
        staircase: Shape (m, 2): the front of these two objectives alone, in ascending x. Front points off the staircase
            are on the front because of another objective.
    """

    x: Axis
    y: Axis
    colour: Axis | None
    others: Points
    tied: Points
    front: Points
    dense: Points
    knee: Points
    staircase: FloatArray

    def label_sides(self) -> list[tuple[str, str]]:
        """Placement of each front point's trial number: ("left"|"right", "top"|"bottom").

        The corner towards the ideal is preferred, since no trial can be there. A corner covered by a marker or another
        number is skipped if another one is free.
        """
        groups = ((self.others, self.tied), (self.dense,), (self.front,))
        blocks = [np.concatenate([np.column_stack([part.x, part.y]) for part in group]) for group in groups]
        marks = np.concatenate(blocks)
        if len(self.front) == 0:
            return []
        origin, span = marks.min(axis=0), np.ptp(marks, axis=0)
        grey, dense, front = ((block - origin) / np.where(span > 0, span, 1.0) for block in blocks)
        across = ("left", "right") if self.x.objective.direction == "minimize" else ("right", "left")
        upward = ("bottom", "top") if self.y.objective.direction == "minimize" else ("top", "bottom")
        corners = [(h, v) for v in upward for h in across]
        reach, clearance = np.array([0.026, 0.038]), np.array([0.036, 0.048])  # shares of the panel
        taken, sides = [*dense, *front], [corners[0]] * len(front)
        # The outermost point is placed first, so that its neighbour's number does not cover it.
        for index in np.argsort(front[:, 0] if across[0] == "left" else -front[:, 0], kind="stable"):
            spots = [front[index] + reach * (1 if h == "right" else -1, 1 if v == "top" else -1) for h, v in corners]
            crowd = [_near(spot, taken, clearance) + 0.3 * _near(spot, grey, clearance) for spot in spots]
            best = int(np.argmin(crowd))
            taken.append(spots[best])
            sides[index] = corners[best]
        return sides

    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Limits of both axes, from the points alone, so that one wide interval does not compress the plot.

        Longer intervals are clipped at the frame.
        """
        ends = []
        for values in ([p.x for p in self._all()], [p.y for p in self._all()]):
            joined = np.concatenate(values)
            low, high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
            margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
            ends.append((low - margin, high + margin))
        return ends[0], ends[1]

    def _all(self) -> tuple[Points, ...]:
        return (self.others, self.tied, self.front, self.dense)

    @property
    def steps_after(self) -> bool:
        """Whether the staircase runs along x before it steps to the next y (x minimised) or after (x maximised)."""
        return self.x.objective.direction == "minimize"


def front_panels(
    trials: pd.DataFrame, objectives: Sequence[Objective], *, x: str | None = None, y: str | None = None
) -> list[Panel]:
    """One panel per objective against accuracy (without it, the first objective), or a single panel of `x` and `y`.

    Args:
        objectives: The study's objectives; they determine the front.
        x: Horizontal axis of a single panel: an objective or `reduction`.
        y: Vertical axis; by default accuracy or the first objective.

    Raises:
        ConfigError: There is no objective, a column is missing, or an axis is unknown.
    """
    marked = mark_front(trials, objectives)
    require_columns(marked, ("trial", "point_id", "reduction"))
    up = _axis_objective(y) if y else next((o for o in objectives if o.name == "accuracy"), objectives[0])
    across = [_axis_objective(x)] if x else [o for o in objectives if o.name != up.name] or [REDUCTION]
    require_columns(marked, [up.name, *(entry.name for entry in across)])
    made = []
    for entry in across:
        third = next((o for o in objectives if o.name not in (entry.name, up.name)), None)
        made.append(_panel(marked, objectives, entry, up, third))
    return made


def _axis_objective(name: str) -> Objective:
    return REDUCTION if name == REDUCTION.name else objective_named(name)


def _panel(
    marked: pd.DataFrame, objectives: Sequence[Objective], x: Objective, y: Objective, third: Objective | None
) -> Panel:
    complete = (marked["state"] == "complete").to_numpy(dtype=bool)
    shown = complete & np.isfinite(numbers(marked, x.name)) & np.isfinite(numbers(marked, y.name))
    dense = dense_row(marked)
    is_dense = shown & (False if dense is None else (marked["trial"] == dense["trial"]).to_numpy(dtype=bool))
    on_front = shown & marked["on_front"].to_numpy(dtype=bool)
    is_tied = shown & ~np.isnan(numbers(marked, "tied_with")) & ~on_front & ~is_dense
    axes = [_axis(marked[shown], entry) for entry in (x, y, third) if entry is not None]
    groups = [
        shown & ~on_front & ~is_dense & ~is_tied,
        is_tied,
        on_front & ~is_dense,
        is_dense,
        _knee(marked, objectives, is_dense) & shown,
    ]
    others, tied, front, dense_points, knee = (_points(marked, np.flatnonzero(group), axes) for group in groups)
    return Panel(
        x=axes[0],
        y=axes[1],
        colour=axes[2] if third is not None else None,
        others=others,
        tied=tied,
        front=front,
        dense=dense_points,
        knee=knee,
        staircase=_staircase(marked, objectives, axes),
    )


def _near(spot: FloatArray, others: Sequence[FloatArray] | FloatArray, clearance: FloatArray) -> int:
    return sum(bool(np.all(np.abs(spot - other) < clearance)) for other in others)


def _axis(shown: pd.DataFrame, entry: Objective) -> Axis:
    some_predicted = any(is_predicted(row, entry.name) for _, row in shown.iterrows())
    return Axis(entry, scale_for(entry, numbers(shown, entry.name)), some_predicted)


def _knee(marked: pd.DataFrame, objectives: Sequence[Objective], is_dense: np.ndarray) -> np.ndarray:
    index = knee_index(objective_matrix(marked, objectives), directions_of(objectives), ~is_dense)
    mask = np.zeros(len(marked), dtype=bool)
    # A knee needs two objectives and three points.
    if index is not None and len(objectives) > 1 and int(marked["on_front"].sum()) > 2:
        mask[index] = True
    return mask


def _points(marked: pd.DataFrame, rows: np.ndarray, axes: Sequence[Axis]) -> Points:
    part = marked.iloc[rows]
    values = [numbers(part, axis.objective.name) * axis.scale.factor for axis in axes]
    errors = []
    for axis, value in zip(axes[:2], values, strict=False):
        ends = [numbers(part, f"{axis.objective.name}_{end}") * axis.scale.factor for end in ("low", "high")]
        errors.append(np.clip(np.array([value - ends[0], ends[1] - value]), 0.0, None))
    colour = values[2] if len(values) > 2 else None
    return Points(rows, part["trial"].to_numpy(dtype=int), values[0], values[1], errors[0], errors[1], colour)


def _staircase(marked: pd.DataFrame, objectives: Sequence[Objective], axes: Sequence[Axis]) -> FloatArray:
    eligible = ~np.isnan(objective_matrix(marked, objectives)).any(axis=1)
    plane = np.column_stack([numbers(marked, axis.objective.name) * axis.scale.factor for axis in axes[:2]])[eligible]
    best = plane[non_dominated(plane, [axis.objective.direction for axis in axes[:2]])]
    return np.unique(best, axis=0)
