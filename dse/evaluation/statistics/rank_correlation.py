"""Spearman's rank correlation as a mean over documents, so that it takes part in intervals and paired drops."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["ranks", "spearman", "spearman_outcomes"]

Values = NDArray[np.float64]


def ranks(values: Values) -> Values:
    """Ranks from 1, ties sharing their mean rank; shape (documents,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Values = last - (counts - 1) / 2
    return mean_rank[inverse]


def spearman(first: Values, second: Values) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks; NaN where either is constant.

    Args:
        first: Shape (documents,).
        second: Same shape.

    Source: Spearman (1904).
    """
    return _pearson(ranks(first), ranks(second))


def spearman_outcomes(first: Values, second: Values) -> Values:
    """One outcome per document whose mean is Spearman's correlation and whose spread gives its standard error.

    They are the jackknife's pseudo-values, rho + (n - 1) (mean of rho without one - rho without i), shifted so that
    their mean is rho itself. The difference of two points' outcomes is then the pseudo-value of the difference of
    their correlations, so that Student's t on it is the jackknife's interval for a paired drop. An outcome alone means
    nothing and may lie outside [-1, 1].

    Args:
        first: Shape (documents,), at least three.
        second: Same shape.

    Source: Tukey (1958); Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 11.
    """
    rho = spearman(first, second)
    first_ranks, second_ranks = ranks(first), ranks(second)
    without = np.array(
        [_pearson(_ranks_without(first_ranks, i), _ranks_without(second_ranks, i)) for i in range(first.size)]
    )
    without = np.where(np.isnan(without), rho, without)  # what is left is constant
    outcomes: Values = rho + (first.size - 1) * (without.mean() - without)
    return outcomes


def _ranks_without(of: Values, index: int) -> Values:
    """Ranks of the others once one value is gone: those above move down by one, its ties by half."""
    lower = of - (of > of[index]) - 0.5 * (of == of[index])
    return np.delete(lower, index)


def _pearson(first: Values, second: Values) -> float:
    x, y = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan
