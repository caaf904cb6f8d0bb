"""The Pareto front of a study's trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dse.errors import ConfigError
from dse.pareto.dominance import non_dominated
from dse.pareto.hypervolume import normalised_hypervolume
from dse.pareto.objective import Objective, directions_of
from dse.report.columns import FloatArray, dense_row, is_true, numbers, require_columns

__all__ = ["front_hypervolume", "front_table", "mark_front", "objective_values"]


def objective_values(trials: pd.DataFrame, objectives: Sequence[Objective]) -> FloatArray:
    """Objective columns, shape (n, k); rows that may not stand on the front (not complete, or infeasible) are NaN.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    if not objectives:
        raise ConfigError("a front needs at least one objective, but got none; name some, such as accuracy, parameters")
    require_columns(trials, ("state", "feasible", *(objective.name for objective in objectives)))
    values = np.column_stack([numbers(trials, objective.name) for objective in objectives])
    eligible = (trials["state"] == "complete").to_numpy(dtype=bool) & is_true(trials, "feasible")
    values[~eligible] = np.nan
    return values


def mark_front(trials: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """A copy of the trials table whose column `on_front` says which trials no other trial beats.

    Only complete, feasible trials with every objective measured can be on the front; ties are all on it.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    return trials.assign(on_front=non_dominated(objective_values(trials, objectives), directions_of(objectives)))


def front_table(trials: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """The front, and the dense model as its reference, sorted by reduction.

    Args:
        trials: The trials table, one row a trial.
        objectives: What was traded off.

    Returns:
        The trials table's columns with `on_front` renewed and `is_dense` added. The dense row is always there when the
        dense model completed, with `on_front` false where a trial beats it or the study's limits exclude it.

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
    """Normalised hypervolume, in [0, 1], of the trials so far.

    Args:
        trials: The trials table.
        objectives: What was traded off.
        reference: Reference value by objective name, fixed when the study began (see `reference_point`).

    Raises:
        ConfigError: A column or a reference is missing, or a reference equals its ideal.
    """
    for objective in objectives:
        if objective.name not in reference:
            raise ConfigError(f"the hypervolume reference must name every objective, but lacks {objective.name!r}")
    corner = [reference[objective.name] for objective in objectives]
    return normalised_hypervolume(objective_values(trials, objectives), corner, [entry.ideal for entry in objectives])
