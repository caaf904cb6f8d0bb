"""Which group of the plot each trial belongs to, and which trials the chosen ranges keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from dse.report.dashboard.axis_values import AxisChoice, axis_values
from dse.report.trials_table import dense_row, numbers

__all__ = ["GROUPS", "RangeFilter", "groups_of", "kept_by", "range_of"]

GROUPS: Mapping[str, str] = {
    "front": "Pareto front",
    "dense": "Dense model",
    "tied": "Tied with the front",
    "dominated": "Dominated",
    "stopped": "Stopped early (estimate)",
    "infeasible": "Infeasible",
    "failed": "Failed",
    "pending": "In flight or queued",
}
"""Key of a group to its name in the legend, in the order of the legend."""


@dataclass(frozen=True)
class RangeFilter:
    """The range of one axis that trials must lie in; both ends in the absolute unit of the axis."""

    choice: AxisChoice
    low: float
    high: float


def groups_of(trials: pd.DataFrame) -> dict[str, npt.NDArray[np.bool_]]:
    """Group to the trials in it, shape (trials,). Repetitions of earlier trials belong to none."""
    if trials.empty:
        return {name: np.zeros(0, dtype=bool) for name in GROUPS if name != "pending"}
    state = trials["state"].to_numpy()
    complete, feasible = state == "complete", trials["feasible"].to_numpy(dtype=bool)
    dense = dense_row(trials)
    is_dense = np.zeros(len(trials), dtype=bool) if dense is None else trials["trial"].to_numpy() == dense["trial"]
    front = trials["on_front"].to_numpy(dtype=bool) & ~is_dense
    tied = ~np.isnan(numbers(trials, "tied_with")) & ~front & ~is_dense
    return {
        "front": front,
        "dense": is_dense,
        "tied": tied,
        "dominated": complete & feasible & ~front & ~tied & ~is_dense,
        "stopped": state == "stopped",
        "infeasible": ((state == "infeasible") | (complete & ~feasible)) & ~is_dense,
        "failed": np.isin(state, ("failed", "interrupted")),
    }


def range_of(trials: pd.DataFrame, choice: AxisChoice) -> tuple[float, float, str] | None:
    """Smallest and largest absolute value of an axis with the unit that they are in; None without values."""
    found = axis_values(trials, choice, relative=False)
    values = found.value[np.isfinite(found.value)]
    return None if values.size == 0 else (float(values.min()), float(values.max()), found.scale.symbol)


def kept_by(trials: pd.DataFrame, filters: Sequence[RangeFilter]) -> npt.NDArray[np.bool_]:
    """Trials inside every range, shape (trials,); a trial without the value is outside."""
    kept = np.ones(len(trials), dtype=bool)
    for entry in filters:
        values = axis_values(trials, entry.choice, relative=False).value
        slack = 1e-9 * max(abs(entry.low), abs(entry.high))
        with np.errstate(invalid="ignore"):
            kept &= (values >= entry.low - slack) & (values <= entry.high + slack)
    return kept
