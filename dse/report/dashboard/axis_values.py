"""The axes that a reader may choose, and the values of all trials on them, absolute or relative to dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dse.pareto.dominance import FloatArray
from dse.pareto.objective import OBJECTIVES, REDUCTION, Objective
from dse.report.trials_table import dense_row, number, numbers
from dse.report.units import Scale, scale_for

__all__ = ["AxisChoice", "AxisValues", "axis_choices", "axis_values", "default_axes", "task_columns"]

_TASK = "task."
_STDERR = "_stderr"
_Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class AxisChoice:
    """An axis.

    Attributes:
        key: Column of the trials table.
        label: Its name.
        objective: Unit and direction.
        is_objective: Whether the study optimises it.
    """

    key: str
    label: str
    objective: Objective
    is_objective: bool = False

    @property
    def is_task(self) -> bool:
        """Whether it is a metric of one task."""
        return self.key.startswith(_TASK)


@dataclass(frozen=True, eq=False)
class AxisValues:
    """The values of all trials on one axis, in the unit shown; NaN if unknown.

    Attributes:
        choice: The axis.
        title: Its title, with unit and direction.
        short_title: The same without the direction.
        value: Shape (trials,).
        low: Lower ends of the 95 % intervals.
        high: Upper ends.
        is_estimate: Shape (trials,): the value is the estimate at which a trial was stopped.
        dense: Value of the dense model; None if unknown.
        scale: Scale of the absolute values.
        is_relative: Whether the values are relative to dense.
    """

    choice: AxisChoice
    title: str
    short_title: str
    value: FloatArray
    low: FloatArray
    high: FloatArray
    is_estimate: np.ndarray
    dense: float | None
    scale: Scale
    is_relative: bool

    def text(self, value: float) -> str:
        """A number of this axis with its unit."""
        if not np.isfinite(value):
            return "n/a"
        if self.is_relative and self.choice.key != REDUCTION.name:
            return _relative_text(self.choice.objective, value)
        return f"{value:.{self.scale.decimals}f} {self.scale.symbol}".rstrip()


def axis_choices(trials: pd.DataFrame, objectives: Sequence[Objective]) -> list[AxisChoice]:
    """The study's objectives, the reduction, other quantities that were measured, and the metrics of single tasks."""
    found = [AxisChoice(entry.name, entry.label, entry, True) for entry in objectives]
    found.append(AxisChoice(REDUCTION.name, "Reduction of parameters", REDUCTION))
    known = {choice.key for choice in found}
    for name, entry in OBJECTIVES.items():
        if name not in known and np.isfinite(numbers(trials, name)).any():
            found.append(AxisChoice(name, entry.label, entry))
    for column in task_columns(trials):
        task, _, metric = column.removeprefix(_TASK).rpartition(".")
        values = numbers(trials, column)
        fraction = bool(np.nanmax(values, initial=0.0) <= 1.0 and np.nanmin(values, initial=0.0) >= 0.0)
        entry = Objective(column, "fraction" if fraction else "", "maximize", f"{task} {metric}", 0.0, is_cost=False)
        found.append(AxisChoice(column, f"{task}: {metric}", entry))
    return found


def task_columns(trials: pd.DataFrame) -> list[str]:
    """Columns `task.<task>.<metric>` of the trials table."""
    names = [str(name) for name in trials.columns if str(name).startswith(_TASK)]
    return [n for n in names if not n.endswith((_STDERR, ".documents")) and np.isfinite(numbers(trials, n)).any()]


def default_axes(objectives: Sequence[Objective]) -> tuple[str, str]:
    """The horizontal and vertical axis that a page begins with: a cost against accuracy."""
    names = [entry.name for entry in objectives]
    up = "accuracy" if "accuracy" in names else names[0]
    measured = [o.name for o in objectives if o.is_cost and o.name not in (up, "parameters", "weight_bytes")]
    others = measured or [n for n in names if n != up] or [REDUCTION.name]
    return others[0], up


def axis_values(trials: pd.DataFrame, choice: AxisChoice, *, relative: bool) -> AxisValues:
    """The values of all trials on an axis."""
    entry, name = choice.objective, choice.key
    value, low, high, is_estimate = _absolute(trials, choice)
    scale = scale_for(entry, value)
    if entry.is_fraction:
        scale = Scale("%", 100.0, 1)
    dense = None if trials.empty else dense_row(trials)
    base = None if dense is None else number(dense, name)
    better = "lower is better" if entry.direction == "minimize" else "higher is better"
    if not relative or name == REDUCTION.name or base is None:
        title = f"{choice.label} ({scale.symbol})" if scale.symbol else choice.label
        factor = scale.factor
        dense_value = None if base is None else base * factor
        return AxisValues(
            choice, f"{title}, {better}", title, value * factor, low * factor, high * factor, is_estimate, dense_value,
            scale, False,
        )  # fmt: skip
    value, low, high, unit, dense_value = _relative(trials, choice, (value, low, high), base)
    title = f"{choice.label}, {unit}"
    return AxisValues(
        choice, f"{title}, {better}", title, value, low, high, is_estimate, dense_value, scale, True
    )  # fmt: skip


def _absolute(trials: pd.DataFrame, choice: AxisChoice) -> tuple[FloatArray, FloatArray, FloatArray, np.ndarray]:
    name = choice.key
    value = numbers(trials, name)
    if choice.is_task:
        reach = _Z * numbers(trials, f"{name}{_STDERR}")
        return value, value - reach, value + reach, np.zeros(len(value), dtype=bool)
    low, high = numbers(trials, f"{name}_low"), numbers(trials, f"{name}_high")
    guess = numbers(trials, f"{name}_estimate")
    is_estimate = np.isnan(value) & ~np.isnan(guess)
    ends = [numbers(trials, f"{name}_estimate_{end}") for end in ("low", "high")]
    return (
        np.where(is_estimate, guess, value),
        np.where(is_estimate, ends[0], low),
        np.where(is_estimate, ends[1], high),
        is_estimate,
    )


def _relative(
    trials: pd.DataFrame, choice: AxisChoice, absolute: tuple[FloatArray, FloatArray, FloatArray], base: float
) -> tuple[FloatArray, FloatArray, FloatArray, str, float]:
    """Changes from dense: differences in points or nats, else ratios in percent; paired where the study pairs them."""
    entry, name = choice.objective, choice.key
    value, nothing = absolute[0], np.full(len(trials), np.nan)
    if entry.is_difference:
        factor = 100.0 if entry.is_fraction else 1.0
        unit = "points from dense" if entry.is_fraction else f"{entry.unit} from dense"
        drop, ends = numbers(trials, f"{name}_drop"), [numbers(trials, f"{name}_drop_{e}") for e in ("low", "high")]
        paired = ~np.isnan(drop)
        change = np.where(paired, -drop, value - base) * factor
        low, high = np.where(paired, -ends[1], nothing) * factor, np.where(paired, -ends[0], nothing) * factor
        return change, low, high, unit, 0.0
    ratio, ends = numbers(trials, f"{name}_ratio"), [numbers(trials, f"{name}_ratio_{e}") for e in ("low", "high")]
    if base <= 0:
        return value, absolute[1], absolute[2], entry.unit or "absolute", base
    paired = ~np.isnan(ratio)
    change = np.where(paired, ratio, value / base) * 100.0
    return (
        change,
        np.where(paired, ends[0], nothing) * 100.0,
        np.where(paired, ends[1], nothing) * 100.0,
        "% of dense",
        100.0,
    )


def _relative_text(objective: Objective, value: float) -> str:
    if objective.is_fraction:
        return f"{value:+.1f} points"
    return f"{value:+.3f} {objective.unit}" if objective.is_difference else f"{value:.1f} % of dense"
