"""Exact hypervolume: the volume that a set of points dominates, bounded by a reference point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dse.errors import ConfigError
from dse.pareto.dominance import FloatArray, minimised, non_dominated
from dse.pareto.objective import signs

__all__ = ["GrowingHypervolume", "hypervolume", "normalised_hypervolume"]


def hypervolume(values: npt.ArrayLike, reference: npt.ArrayLike, directions: Sequence[str]) -> float:
    """Volume dominated by `values` and bounded by `reference`, in the product of the columns' units.

    Args:
        values: Shape (n, k), k >= 1. Rows with a NaN, and rows that do not improve on the reference in every column,
            add nothing.
        reference: Shape (k,), finite.
        directions: "minimize" or "maximize" for each column.

    Returns:
        The exact volume; 0.0 without points.

    Raises:
        ConfigError: The shapes differ, the reference is not finite, or a point is infinitely good.

    Source: While, Bradstreet and Barone (2012), WFG; a sweep for k <= 2.
    """
    costs = minimised(values, directions)
    corner = _vector(reference, len(directions), "reference") * signs(directions)
    gains = corner - costs
    if np.isposinf(gains).any():
        raise ConfigError("a hypervolume needs finite points, but one is infinitely better than the reference")
    return _volume(_inside(gains))


def normalised_hypervolume(values: npt.ArrayLike, reference: npt.ArrayLike, ideal: npt.ArrayLike) -> float:
    """Fraction of the box from `reference` to `ideal` that `values` dominate.

    A column is maximised if its ideal exceeds its reference, and minimised otherwise. Points worse than the reference
    add nothing; values beyond the ideal are clipped to it.

    Args:
        values: Shape (n, k); rows with a NaN add nothing.
        reference: Shape (k,), finite.
        ideal: Shape (k,), finite, different from the reference in every column.

    Returns:
        A number in [0, 1].

    Raises:
        ConfigError: The shapes differ, or reference and ideal are not finite or are equal in a column.
    """
    points = np.asarray(values, dtype=np.float64)
    corner = np.asarray(reference, dtype=np.float64)
    corner = _vector(corner, corner.size, "reference")
    best = _vector(ideal, corner.size, "ideal")
    if np.any(best == corner):
        raise ConfigError(f"reference and ideal must differ in every objective, but got {corner} and {best}")
    if points.ndim != 2 or points.shape[1] != corner.size:
        raise ConfigError(
            f"values must have shape (n, {corner.size}), one column per objective, but got {points.shape}"
        )
    gains = np.minimum((corner - points) / (corner - best), 1.0)  # np.minimum propagates NaN
    return min(1.0, max(0.0, _volume(_inside(gains))))


class GrowingHypervolume:
    """The normalised hypervolume of points that arrive one at a time.

    Adding a point costs what the part that it adds costs, not the volume of all points: only the front is kept, clipped
    to the box of the new point.

    Args:
        reference: Shape (k,), finite.
        ideal: Shape (k,), finite, different from the reference in every column.

    Raises:
        ConfigError: Reference and ideal are not finite or are equal in a column.
    """

    def __init__(self, reference: npt.ArrayLike, ideal: npt.ArrayLike) -> None:
        normalised_hypervolume(np.empty((0, np.size(reference))), reference, ideal)  # checks both
        self._corner = np.asarray(reference, dtype=np.float64)
        self._span = self._corner - np.asarray(ideal, dtype=np.float64)
        self._front = np.empty((0, self._corner.size))
        self.value = 0.0

    def add(self, values: npt.ArrayLike) -> float:
        """Add a point, shape (k,), and return the volume that it adds; 0 for a point with a NaN."""
        gain = np.minimum((self._corner - np.asarray(values, dtype=np.float64)) / self._span, 1.0)
        if not (gain > 0).all() or (self._front >= gain).all(axis=1).any():
            return 0.0
        added = max(0.0, float(np.prod(gain)) - _volume(np.minimum(self._front, gain)))
        self._front = np.vstack([self._front[~(self._front <= gain).all(axis=1)], gain])
        self.value = min(1.0, self.value + added)
        return added


def _vector(values: npt.ArrayLike, length: int, what: str) -> FloatArray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ConfigError(f"the {what} must be {length} finite numbers, one per objective, but got {vector}")
    return vector


def _inside(gains: FloatArray) -> FloatArray:
    """The rows that improve on the reference in every column; NaN does not."""
    return gains[np.all(gains > 0, axis=1)]


def _volume(gains: FloatArray) -> float:
    """Volume of the union of the boxes [0, gain] over the rows of `gains`, shape (n, k), all positive."""
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    if gains.shape[1] == 2:
        return _area(gains)
    # WFG: each point adds its own box minus the part that later points cover. In ascending order of the last gain,
    # every later point spans the box along that column, which leaves a problem of k - 1 columns.
    front = np.unique(gains[non_dominated(gains, ["maximize"] * gains.shape[1])], axis=0)
    ordered = front[np.argsort(front[:, -1], kind="stable")]
    heights, bases = ordered[:, -1], ordered[:, :-1]
    total = 0.0
    for index, base in enumerate(bases):
        covered = _volume(np.minimum(bases[index + 1 :], base))
        total += float(heights[index] * (np.prod(base) - covered))
    return total


def _area(gains: FloatArray) -> float:
    """Area below the staircase of a two-column front: the height at x is the best second gain at or beyond x."""
    ordered = gains[np.argsort(gains[:, 0])]
    heights = np.maximum.accumulate(ordered[::-1, 1])[::-1]
    return float(np.sum(np.diff(ordered[:, 0], prepend=0.0) * heights))
