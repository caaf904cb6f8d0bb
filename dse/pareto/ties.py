"""Ties with the front: dominated rows whose disadvantage is within noise in every objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dse.pareto.dominance import minimised, non_dominated

__all__ = ["advantage_within_noise", "tied_rows"]


def tied_rows(
    values: npt.ArrayLike, directions: Sequence[str], is_tie: Callable[[int, int], bool]
) -> npt.NDArray[np.int64]:
    """For each dominated row, the front row that it is tied with.

    A row is tied with the front if `is_tie` holds for every front row that dominates it.

    Args:
        values: Shape (n, k); NaN if not measured.
        directions: "minimize" or "maximize" for each column.
        is_tie: Called with (front row, dominated row): whether they differ by noise alone.

    Returns:
        Shape (n,): the first front row that dominates and ties; -1 if there is none. Front rows get -1.

    Raises:
        ConfigError: The shape does not match the directions, or a direction is unknown.
    """
    costs = minimised(values, directions)
    on_front = non_dominated(values, directions)
    tied = np.full(len(costs), -1, dtype=np.int64)
    for row in np.flatnonzero(~on_front & ~np.isnan(costs).any(axis=1)):
        better = np.flatnonzero(on_front & (costs <= costs[row]).all(axis=1))
        if better.size and all(is_tie(int(index), int(row)) for index in better):
            tied[row] = better[0]
    return tied


def advantage_within_noise(
    better: tuple[float, float, float], worse: tuple[float, float, float], direction: str
) -> bool:
    """Whether the advantage of `better` over `worse` is no larger than the noise of two independent values.

    Args:
        better: (value, low, high): a value with its 95 % interval.
        worse: The value to compare with, likewise.
        direction: "minimize" or "maximize".

    Returns:
        True if the 95 % interval of the advantage reaches zero. An advantage below zero is within noise.

    Source: MOVER, Zou and Donner (2008).
    """
    (first, first_low, first_high), (second, second_low, second_high) = better, worse
    if direction == "minimize":
        return second - first <= math.hypot(first_high - first, second - second_low)
    return first - second <= math.hypot(first - first_low, second_high - second)
