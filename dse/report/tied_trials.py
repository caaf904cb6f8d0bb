"""Trials that are tied with the front: dominated, but within noise in every objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dse.pareto.objective import Objective, directions_of
from dse.pareto.ties import advantage_within_noise, tied_rows
from dse.report.trials_table import dense_row, interval, number, objective_matrix, require_columns

__all__ = ["RESOLUTION", "PairedDifference", "mark_ties", "tied_table"]

RESOLUTION = 0.01
"""Exact values (parameters, bytes) tie if they differ by less than this fraction of the dense model's value."""

PairedDifference = Callable[[str, int, int], bool | None]
"""Called with (objective, trial, trial): whether the two differ significantly in a test paired by document; None if
their per-document outcomes are unknown."""


def mark_ties(
    marked: pd.DataFrame, objectives: Sequence[Objective], differs: PairedDifference | None = None
) -> pd.DataFrame:
    """A copy of the trials table with the column `tied_with`: the front trial that a dominated trial is tied with.

    A trial is tied with the front if its difference from every front trial that dominates it is within noise in each
    objective:

    - accuracy, perplexity and graded metrics: not significant at 5 % in the test paired by document (without
      per-document outcomes: the interval of the difference of two independent values contains zero);
    - quantities measured with an interval, such as latency: the interval of the difference contains zero;
    - exact values, and values without an interval: below `RESOLUTION` of the dense model's value.

    If several front trials dominate it, `tied_with` names the one with the lowest number.

    Args:
        marked: The trials table with `on_front` (see `mark_front`).

    Raises:
        ConfigError: A column is missing.
    """
    require_columns(marked, ("trial", "on_front"))
    order = np.argsort(marked["trial"].to_numpy(), kind="stable")
    # Cells of a dict are read much faster than those of a Series.
    rows: list[Any] = marked.iloc[order].to_dict(orient="records")
    dense = dense_row(marked)
    # Costs first: the paired test reads files.
    ordered = sorted(objectives, key=lambda objective: not objective.is_cost)

    def is_tie(better: int, worse: int) -> bool:
        return all(_is_within_noise(rows[better], rows[worse], entry, dense, differs) for entry in ordered)

    found = tied_rows(objective_matrix(marked, objectives)[order], directions_of(objectives), is_tie)
    tied: list[int | None] = [None] * len(marked)
    for position, front_row in zip(order, found, strict=True):
        tied[position] = int(rows[front_row]["trial"]) if front_row >= 0 else None
    return marked.assign(tied_with=pd.array(tied, dtype="Int64"))


def tied_table(marked: pd.DataFrame) -> pd.DataFrame:
    """The tied trials of a table from `mark_ties`, sorted by reduction."""
    if "tied_with" not in marked.columns:
        return marked.iloc[:0]
    return marked[marked["tied_with"].notna().to_numpy(dtype=bool)].sort_values(["reduction", "trial"], kind="stable")


def _is_within_noise(
    better: pd.Series, worse: pd.Series, objective: Objective, dense: pd.Series | None, differs: PairedDifference | None
) -> bool:
    first, second = number(better, objective.name), number(worse, objective.name)
    if first is None or second is None:
        return False
    if first == second:
        return True
    if not objective.is_cost and differs is not None:
        is_significant = differs(objective.name, int(better["trial"]), int(worse["trial"]))
        if is_significant is not None:
            return not is_significant
    # Ratios to the dense model, measured alongside each trial, are affected less by drift than the values.
    for name in (f"{objective.name}_ratio", objective.name):
        estimates = _estimate(better, name), _estimate(worse, name)
        if estimates[0] is not None and estimates[1] is not None:
            return advantage_within_noise(estimates[0], estimates[1], objective.direction)
    base = None if dense is None else number(dense, objective.name)
    return abs(first - second) < RESOLUTION * abs(second if base is None else base)


def _estimate(row: pd.Series, name: str) -> tuple[float, float, float] | None:
    """(value, low, high); None if one is unknown."""
    value, ends = number(row, name), interval(row, name)
    return None if value is None or ends is None else (value, *ends)
