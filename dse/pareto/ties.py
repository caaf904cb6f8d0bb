"""Which dominated trials are tied with the front: beaten by it within noise only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from dse.pareto.dominance import minimised
from dse.pareto.front import objective_values
from dse.pareto.objective import Objective, directions_of
from dse.report.columns import dense_row, interval, number, require_columns

__all__ = ["RESOLUTION", "PairedDifference", "mark_ties", "tied_table"]

RESOLUTION = 0.01
"""Figures without noise (parameters, bytes) tie where they differ by less than this share of the dense model's."""

PairedDifference = Callable[[str, int, int], bool | None]
"""Called with (objective, trial, trial): whether their difference is beyond noise in a test paired by document; None
where that is not known."""


def mark_ties(
    marked: pd.DataFrame, objectives: Sequence[Objective], differs: PairedDifference | None = None
) -> pd.DataFrame:
    """A copy of the trials table with the column `tied_with`: the front trial that beats a trial within noise only.

    A trial is tied with the front where every front trial that dominates it does so within noise: in each objective
    the difference of the two is

    - for accuracy, perplexity and graded metrics: not significant at 5 % in the test paired by document (where no
      outcomes are at hand: the interval of the difference of two independent values holds zero);
    - for what was measured with an interval, such as latency: the interval of the difference holds zero;
    - for exact figures, and where no interval is known: below `RESOLUTION` of the dense model's value.

    Of several front trials it is tied with the first.

    Args:
        marked: The trials table with `on_front` (see `mark_front`).
        objectives: What was traded off.
        differs: The paired test.

    Raises:
        ConfigError: A column is missing.
    """
    require_columns(marked, ("trial", "on_front"))
    values = minimised(objective_values(marked, objectives), directions_of(objectives))
    on_front = marked["on_front"].to_numpy(dtype=bool)
    rows = [row for _, row in marked.iterrows()]
    dense = dense_row(marked)
    tied: list[int | None] = [None] * len(marked)
    for index in np.flatnonzero(~on_front & ~np.isnan(values).any(axis=1)):
        beats = on_front & (values <= values[index]).all(axis=1) & (values < values[index]).any(axis=1)
        better = sorted((rows[i] for i in np.flatnonzero(beats)), key=lambda row: int(row["trial"]))
        if better and all(_is_tie(row, rows[index], objectives, dense, differs) for row in better):
            tied[index] = int(better[0]["trial"])
    return marked.assign(tied_with=pd.array(tied, dtype="Int64"))


def tied_table(marked: pd.DataFrame) -> pd.DataFrame:
    """The tied trials of a table that `mark_ties` made, sorted by reduction."""
    if "tied_with" not in marked.columns:
        return marked.iloc[:0]
    return marked[marked["tied_with"].notna().to_numpy(dtype=bool)].sort_values(["reduction", "trial"], kind="stable")


def _is_tie(
    better: pd.Series,
    worse: pd.Series,
    objectives: Sequence[Objective],
    dense: pd.Series | None,
    differs: PairedDifference | None,
) -> bool:
    # Cheap comparisons first: the paired test reads files.
    ordered = sorted(objectives, key=lambda objective: not objective.is_cost)
    return all(_is_within_noise(better, worse, objective, dense, differs) for objective in ordered)


def _is_within_noise(
    better: pd.Series,
    worse: pd.Series,
    objective: Objective,
    dense: pd.Series | None,
    differs: PairedDifference | None,
) -> bool:
    first, second = number(better, objective.name), number(worse, objective.name)
    if first is None or second is None:
        return False
    if first == second:
        return True
    if not objective.is_cost and differs is not None:
        is_beyond = differs(objective.name, int(better["trial"]), int(worse["trial"]))
        if is_beyond is not None:
            return not is_beyond
    # Ratios to the dense model measured beside each trial are freer of drift than the values.
    for name in (f"{objective.name}_ratio", objective.name):
        spread = _independent_spread(better, worse, name, objective.sign)
        if spread is not None:
            gap, reach = spread
            return gap <= reach
    base = None if dense is None else number(dense, objective.name)
    return abs(first - second) < RESOLUTION * abs(second if base is None else base)


def _independent_spread(better: pd.Series, worse: pd.Series, name: str, sign: float) -> tuple[float, float] | None:
    """(by how much `better` is better, how far noise reaches) of two independent values; None without intervals.

    Source: MOVER, Zou and Donner (2008).
    """
    values = number(better, name), number(worse, name)
    ends = interval(better, name), interval(worse, name)
    if values[0] is None or values[1] is None or ends[0] is None or ends[1] is None:
        return None
    gap = sign * (values[1] - values[0])
    # The sides that face each other: smaller is better where the sign is +1.
    facing = (ends[0][1] - values[0], values[1] - ends[1][0]) if sign > 0 else (
        values[0] - ends[0][0], ends[1][1] - values[1]
    )  # fmt: skip
    return gap, math.hypot(*facing)
