"""The trials table, one row per trial: typed access to its columns, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from dse.errors import ConfigError, did_you_mean
from dse.pareto.dominance import FloatArray, non_dominated
from dse.pareto.hypervolume import normalised_hypervolume
from dse.pareto.objective import Objective, directions_of, ideal_point

__all__ = [
    "change",
    "dense_row",
    "front_hypervolume",
    "front_table",
    "interval",
    "is_eligible",
    "is_predicted",
    "is_true",
    "mark_front",
    "number",
    "numbers",
    "objective_matrix",
    "require_columns",
]


def require_columns(trials: pd.DataFrame, names: Iterable[str]) -> None:
    """Check that the trials table has these columns.

    Raises:
        ConfigError: A column is missing; the message suggests the nearest one.
    """
    present = [str(column) for column in trials.columns]
    for name in names:
        if name not in present:
            raise ConfigError(
                f"the trials table must have a column {name!r}, but has {len(present)} others"
                f"{did_you_mean(name, present)}"
            )


def numbers(trials: pd.DataFrame, name: str) -> FloatArray:
    """A column as floats, shape (n,); NaN for missing and non-numeric cells, and if there is no such column."""
    if name not in trials.columns:
        return np.full(len(trials), np.nan)
    return pd.to_numeric(trials[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def is_true(trials: pd.DataFrame, name: str) -> npt.NDArray[np.bool_]:
    """A Boolean column, shape (n,); missing values are false."""
    return np.array([not pd.isna(value) and value == 1 for value in trials[name]], dtype=bool)


def is_eligible(trials: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """The trials that may be on the front, shape (n,): complete and feasible."""
    return (trials["state"] == "complete").to_numpy(dtype=bool) & is_true(trials, "feasible")


def is_predicted(row: pd.Series, name: str) -> bool:
    """Whether a value was predicted instead of measured; in a CSV file the flag is text or blank."""
    return row.get(f"{name}_is_predicted") in (True, "True")


def number(row: pd.Series, name: str) -> float | None:
    """One cell as a float; None if it is missing, not a number or not finite."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def interval(row: pd.Series, name: str) -> tuple[float, float] | None:
    """The 95 % interval of a quantity, `<name>_low` to `<name>_high`; None if an end is missing."""
    low, high = number(row, f"{name}_low"), number(row, f"{name}_high")
    return None if low is None or high is None else (low, high)


def dense_row(trials: pd.DataFrame) -> pd.Series | None:
    """The dense model's row: the first complete trial that decomposes nothing; None if there is none."""
    require_columns(trials, ("trial", "state", "decomposed_tensors"))
    dense = trials[(trials["state"] == "complete").to_numpy() & (numbers(trials, "decomposed_tensors") == 0)]
    return None if dense.empty else dense.sort_values("trial").iloc[0]


def change(
    row: pd.Series, dense: pd.Series | None, objective: Objective
) -> tuple[float, tuple[float, float] | None] | None:
    """Change from the dense model with its 95 % interval: a difference for fractions and nats, otherwise a ratio.

    Taken from the paired columns `<name>_drop` or `<name>_ratio`; without them computed from the two values, and then
    without an interval.

    Returns:
        (change, (low, high) or None); None if unknown. A positive difference is an increase.
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


def objective_matrix(trials: pd.DataFrame, objectives: Sequence[Objective]) -> FloatArray:
    """The objective columns, shape (n, k); all NaN for trials that may not be on the front.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    if not objectives:
        raise ConfigError("a front needs at least one objective, but got none; name some, such as accuracy, parameters")
    require_columns(trials, ("state", "feasible", *(objective.name for objective in objectives)))
    values = np.column_stack([numbers(trials, objective.name) for objective in objectives])
    values[~is_eligible(trials)] = np.nan
    return values


def mark_front(trials: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """A copy of the trials table with the column `on_front`: the trials that no other trial dominates.

    Only complete, feasible trials with every objective measured can be on the front. Trials with equal values are on it
    together.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    return trials.assign(on_front=non_dominated(objective_matrix(trials, objectives), directions_of(objectives)))


def front_table(trials: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """The front, and the dense model as its reference, sorted by reduction.

    Returns:
        The columns of the trials table with `on_front` updated and `is_dense` added. The dense row is included whenever
        the dense model is complete; its `on_front` is false if a trial dominates it or it is infeasible.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    require_columns(trials, ("trial", "reduction"))
    marked = mark_front(trials, objectives)
    dense = dense_row(marked)
    marked["is_dense"] = False if dense is None else (marked["trial"] == dense["trial"]).to_numpy(dtype=bool)
    kept = marked[marked["on_front"] | marked["is_dense"]]
    return kept.sort_values(["reduction", "trial"], kind="stable").reset_index(drop=True)


def front_hypervolume(trials: pd.DataFrame, objectives: Sequence[Objective], reference: Mapping[str, float]) -> float:
    """Normalised hypervolume of the trials, in [0, 1].

    Args:
        reference: Objective to its reference value (see `dse.pareto.reference_point`).

    Raises:
        ConfigError: A column or a reference is missing, or a reference equals its ideal.
    """
    for objective in objectives:
        if objective.name not in reference:
            raise ConfigError(f"the hypervolume reference must name every objective, but lacks {objective.name!r}")
    corner = [reference[objective.name] for objective in objectives]
    return normalised_hypervolume(objective_matrix(trials, objectives), corner, ideal_point(objectives, corner))
