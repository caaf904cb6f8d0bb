"""Choice of a point: the cheapest whose accuracy drop is within a tolerance, by its confidence bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dse.pareto.dominance import FloatArray

__all__ = ["SLACK", "Candidates", "PointChoice", "choose_point"]

SLACK = 1e-9
"""Limits are checked with this slack: a tolerance of 0.02 admits a drop of 0.61 - 0.59 = 0.020000000000000018."""

_NO_SAVING_PENALTY = 10.0


@dataclass(frozen=True, eq=False)
class Candidates:
    """Points to choose from, at least one, as arrays with one entry per point.

    Attributes:
        drop: Accuracy drop from the baseline, as a fraction; shape (n,).
        drop_high: Upper end of its 95 % interval; NaN if unknown.
        reduction: Fraction of the parameters removed.
        cost_ratios: Each cost as a ratio to the baseline, positive; shape (n, k).
    """

    drop: FloatArray
    drop_high: FloatArray
    reduction: FloatArray
    cost_ratios: FloatArray

    @property
    def cost(self) -> FloatArray:
        """Geometric mean of the cost ratios: halving one cost weighs as much as doubling another."""
        mean: FloatArray = np.exp(np.log(self.cost_ratios).mean(axis=1))
        return mean

    @property
    def saves(self) -> npt.NDArray[np.bool_]:
        """Whether at least one cost is below the baseline's."""
        return np.asarray((self.cost_ratios < 1 - SLACK).any(axis=1))


@dataclass(frozen=True)
class PointChoice:
    """Indices of candidates.

    Attributes:
        best: The cheapest within the limits by its point estimate; if none is, the one that misses them by the least.
        fits: Whether `best` is within the limits.
        certified: The cheapest within the limits by the upper bound of its drop; None if there is none.
    """

    best: int
    fits: bool
    certified: int | None


def choose_point(candidates: Candidates, max_drop: float, min_reduction: float = 0.0) -> PointChoice:
    """Choose the cheapest candidate within the limits.

    A candidate fits if its drop is at most `max_drop`, its reduction at least `min_reduction`, and at least one cost
    below the baseline's. Ties in cost go to the smaller drop, then to the earlier candidate.

    Args:
        max_drop: Largest accuracy drop, as a fraction.
        min_reduction: Smallest fraction of the parameters to remove.
    """
    drop, reduction = candidates.drop, candidates.reduction
    fits = (drop <= max_drop + SLACK) & (reduction >= min_reduction - SLACK) & candidates.saves
    if fits.any():
        by_cost = np.lexsort((drop, candidates.cost))
        # A comparison with NaN is false: without an interval nothing is certified.
        certified = by_cost[(fits & (candidates.drop_high <= max_drop + SLACK))[by_cost]]
        return PointChoice(int(by_cost[fits[by_cost]][0]), True, int(certified[0]) if certified.size else None)
    excess = np.maximum(0.0, drop - max_drop) + np.maximum(0.0, min_reduction - reduction)
    shortfall = np.where(candidates.saves, excess, excess + _NO_SAVING_PENALTY)
    return PointChoice(int(np.lexsort((candidates.cost, shortfall))[0]), False, None)
