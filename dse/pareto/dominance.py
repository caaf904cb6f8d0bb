"""Pareto dominance on arrays: which rows no other row beats.

Row a dominates row b when a is at least as good in every column and better in one. Equal rows do not dominate each
other, so ties stay together. A row with a NaN (not measured) takes no part: it neither dominates nor is on the front.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dse.errors import ConfigError
from dse.pareto.objective import signs

__all__ = ["dominates", "minimised", "non_dominated", "non_dominated_rank"]

FloatArray = npt.NDArray[np.float64]


def minimised(values: npt.ArrayLike, directions: Sequence[str]) -> FloatArray:
    """`values`, shape (n, k), turned so that smaller is better in every column.

    Raises:
        ConfigError: The shape does not fit the directions, or a direction is not one.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ConfigError(
            f"values must have shape (n, {len(directions)}), one column a direction, but got {array.shape}"
        )
    return array * signs(directions)


def dominates(first: npt.ArrayLike, second: npt.ArrayLike, directions: Sequence[str]) -> bool:
    """Whether `first`, shape (k,), is nowhere worse than `second` and somewhere better.

    Raises:
        ConfigError: The shapes do not fit the directions, or a direction is not one.
    """
    a, b = (minimised(np.atleast_2d(np.asarray(row, dtype=np.float64)), directions) for row in (first, second))
    return bool(np.all(a <= b) and np.any(a < b))


def non_dominated(values: npt.ArrayLike, directions: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which rows of `values` no other row dominates.

    Args:
        values: Shape (n, k), any units; NaN where not measured.
        directions: "minimize" or "maximize" for each of the k columns.

    Returns:
        Mask of shape (n,). Equal rows are all kept; rows with a NaN are never on the front.

    Raises:
        ConfigError: The shape does not fit the directions, or a direction is not one.

    Source: Kung, Luccio and Preparata (1975), the lexicographic sweep without the divide step.
    """
    costs = minimised(values, directions)
    mask = np.zeros(len(costs), dtype=np.bool_)
    measured = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if measured.size == 0:
        return mask
    # Sorted and without repeats, a row can be dominated only by an earlier one, and `<=` everywhere is dominance.
    unique, group = np.unique(costs[measured], axis=0, return_inverse=True)
    kept = np.zeros(len(unique), dtype=np.bool_)
    for index, row in enumerate(unique):
        kept[index] = not np.any(np.all(unique[:index][kept[:index]] <= row, axis=1))
    mask[measured] = kept[group.reshape(-1)]
    return mask


def non_dominated_rank(values: npt.ArrayLike, directions: Sequence[str]) -> npt.NDArray[np.int64]:
    """Front that each row belongs to: 0 for the non-dominated, 1 for those left when front 0 is removed, and so on.

    Args:
        values: Shape (n, k); NaN where not measured.
        directions: "minimize" or "maximize" for each column.

    Returns:
        Shape (n,), integers; -1 for rows with a NaN, which are on no front.

    Source: Deb et al. (2002), NSGA-II.
    """
    costs = minimised(values, directions)
    ranks = np.full(len(costs), -1, dtype=np.int64)
    remaining = np.flatnonzero(~np.isnan(costs).any(axis=1))
    rank = 0
    while remaining.size:
        front = non_dominated(costs[remaining], ["minimize"] * costs.shape[1])
        ranks[remaining[front]] = rank
        remaining = remaining[~front]
        rank += 1
    return ranks
