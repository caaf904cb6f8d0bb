"""Reading the trials table: typed columns, the dense row, changes against it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd

from dse.errors import ConfigError, did_you_mean
from dse.pareto.objective import Objective

__all__ = ["change", "dense_row", "interval", "is_predicted", "is_true", "number", "numbers", "require_columns"]

FloatArray = npt.NDArray[np.float64]


def require_columns(trials: pd.DataFrame, names: Iterable[str]) -> None:
    """Check that the trials table has these columns.

    Raises:
        ConfigError: One is missing; the message names the nearest.
    """
    present = [str(column) for column in trials.columns]
    for name in names:
        if name not in present:
            raise ConfigError(
                f"the trials table must have a column {name!r}, but has {len(present)} others"
                f"{did_you_mean(name, present)}"
            )


def numbers(trials: pd.DataFrame, name: str) -> FloatArray:
    """Column as floats, shape (n,); NaN where it is missing or not a number, or where there is no such column."""
    if name not in trials.columns:
        return np.full(len(trials), np.nan)
    return pd.to_numeric(trials[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def is_true(trials: pd.DataFrame, name: str) -> npt.NDArray[np.bool_]:
    """Boolean column, shape (n,), a missing value counting as false."""
    return np.array([not pd.isna(value) and value == 1 for value in trials[name]], dtype=bool)


def is_predicted(row: pd.Series, name: str) -> bool:
    """Whether a cell was not measured but predicted; blank, and read from a file text, where no trial's was."""
    return row.get(f"{name}_is_predicted") in (True, "True")


def number(row: pd.Series, name: str) -> float | None:
    """One cell as a float; None where it is missing, not a number or not finite."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def dense_row(trials: pd.DataFrame) -> pd.Series | None:
    """The dense model's trial: the first complete one that decomposes nothing; None where there is none."""
    require_columns(trials, ("trial", "state", "decomposed_tensors"))
    dense = trials[(trials["state"] == "complete").to_numpy() & (numbers(trials, "decomposed_tensors") == 0)]
    return None if dense.empty else dense.sort_values("trial").iloc[0]


def interval(row: pd.Series, name: str) -> tuple[float, float] | None:
    """The 95 % interval of a quantity, `<name>_low` to `<name>_high`; None where either end is missing."""
    low, high = number(row, f"{name}_low"), number(row, f"{name}_high")
    return None if low is None or high is None else (low, high)


def change(
    row: pd.Series, dense: pd.Series | None, objective: Objective
) -> tuple[float, tuple[float, float] | None] | None:
    """Change against the dense model with its 95 % interval: a difference for fractions and nats, else a ratio.

    The table's own paired columns come first (`<name>_drop`, `<name>_ratio`); where they are missing the change is
    taken from the two values, without an interval.

    Returns:
        (change, (low, high) or None), or None where it cannot be known. A positive difference is a gain in value.
    """
    name = objective.name
    value, base = number(row, name), None if dense is None else number(dense, name)
    if objective.is_difference:
        drop, ends = number(row, f"{name}_drop"), interval(row, f"{name}_drop")
        if drop is not None:
            return -drop, None if ends is None else (-ends[1], -ends[0])
        return None if value is None or base is None else (value - base, None)
    ratio = number(row, f"{name}_ratio")
    if ratio is not None:
        return ratio, interval(row, f"{name}_ratio")
    return None if value is None or base is None or base <= 0 else (value / base, None)
