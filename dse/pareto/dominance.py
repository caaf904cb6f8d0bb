"""Pareto dominance on arrays.

Row a dominates row b if it is at least as good in every column and better in one. Equal rows do not dominate each
other. A row with a NaN (not measured) neither dominates another row nor is on the front.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dse.errors import ConfigError
from dse.pareto.objective import signs

__all__ = ["FloatArray", "minimised", "non_dominated"]

FloatArray = npt.NDArray[np.float64]


def minimised(values: npt.ArrayLike, directions: Sequence[str]) -> FloatArray:
    """Negate the maximised columns of `values`, shape (n, k), so that smaller is better in every column.

    Raises:
        ConfigError: The shape does not match the directions, or a direction is unknown.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ConfigError(
            f"values must have shape (n, {len(directions)}), one column per direction, but got {array.shape}"
        )
    return array * signs(directions)


def non_dominated(values: npt.ArrayLike, directions: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Mask of the rows that no other row dominates.

    Args:
        values: Shape (n, k), any units; NaN if not measured.
        directions: "minimize" or "maximize" for each of the k columns.

    Returns:
        Shape (n,). All copies of a repeated row are kept; rows with a NaN are never on the front.

    Raises:
        ConfigError: The shape does not match the directions, or a direction is unknown.

    Source: Kung, Luccio and Preparata (1975), the lexicographic sweep without the divide step.
    """
    costs = minimised(values, directions)
    mask = np.zeros(len(costs), dtype=np.bool_)
    measured = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if measured.size == 0:
        return mask
    # In sorted order without repeats, only an earlier row can dominate, and `<=` in every column is then dominance.
    unique, group = np.unique(costs[measured], axis=0, return_inverse=True)
    kept = np.zeros(len(unique), dtype=np.bool_)
    for index, row in enumerate(unique):
        kept[index] = not np.any(np.all(unique[:index][kept[:index]] <= row, axis=1))
    mask[measured] = kept[group.reshape(-1)]
    return mask
