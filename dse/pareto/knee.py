"""The knee of a front: the point beyond which a small gain in one objective costs much of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dse.pareto.dominance import FloatArray, minimised, non_dominated

__all__ = ["knee_distances", "knee_index"]


def knee_distances(values: npt.ArrayLike, directions: Sequence[str]) -> FloatArray:
    """Distance of each front point towards the ideal from the hyperplane through the front's extremes.

    Objectives are normalised to [0, 1] over the front (0 is best). The extreme of an objective is the front point that
    is best in it. With two objectives the hyperplane is the line x + y = 1. With more, extremes may coincide or span a
    plane that does not face the ideal; the plane sum(x) = 1 is then used, which is a ranking by equal weights. With
    fewer than three distinct points the result is the negative distance to the ideal, so that larger is still better.

    Args:
        values: Shape (n, k), any units; NaN if not measured.
        directions: "minimize" or "maximize" for each column.

    Returns:
        Shape (n,), in normalised units, larger is better; NaN for rows off the front.

    Raises:
        ConfigError: The shape does not match the directions, or a direction is unknown.

    Source: Das (1999), On characterizing the "knee" of the Pareto curve; Branke et al. (2004), Finding knees in
    multi-objective optimization, for equal weights.
    """
    costs = minimised(values, directions)
    distances = np.full(len(costs), np.nan)
    finite = np.isfinite(costs).all(axis=1)
    on_front = np.zeros(len(costs), dtype=bool)
    on_front[finite] = non_dominated(costs[finite], ["minimize"] * costs.shape[1])
    if not on_front.any():
        return distances
    front = costs[on_front]
    best, span = front.min(axis=0), np.ptp(front, axis=0)
    varying = span > 0  # a constant objective carries no information about the knee
    position = (front[:, varying] - best[varying]) / span[varying]
    if len(np.unique(position, axis=0)) < 3:
        distances[on_front] = -np.linalg.norm(position, axis=1)
    else:
        normal = _plane_through_extremes(position)
        distances[on_front] = (1.0 - position @ normal) / np.linalg.norm(normal)
    return distances


def knee_index(values: npt.ArrayLike, directions: Sequence[str], among: npt.ArrayLike | None = None) -> int | None:
    """Row with the largest of `knee_distances`; of equal ones, the row that is best in the first objective.

    Args:
        values: Shape (n, k).
        directions: "minimize" or "maximize" for each column.
        among: Mask, shape (n,), of the rows that may be the knee. All rows define the front.

    Returns:
        The row's index; None if no eligible row is on the front.
    """
    distances = knee_distances(values, directions)
    if among is not None:
        distances = np.where(np.asarray(among, dtype=bool), distances, np.nan)
    if np.isnan(distances).all():
        return None
    tied = np.flatnonzero(distances >= np.nanmax(distances) - 1e-12)
    return int(tied[np.argmin(minimised(values, directions)[tied, 0])])


def _plane_through_extremes(position: FloatArray) -> FloatArray:
    """Normal w of the plane w . x = 1 through the extremes; ones if they span no plane that faces the ideal."""
    count = position.shape[1]
    # Of points that are equally good in an objective, the best in the others is its extreme.
    extremes = np.array([position[np.lexsort((position.sum(axis=1), position[:, j]))[0]] for j in range(count)])
    if np.linalg.matrix_rank(extremes) < count:
        return np.ones(count)
    normal: FloatArray = np.linalg.solve(extremes, np.ones(count))
    return normal if np.all(normal > 1e-9) else np.ones(count)
