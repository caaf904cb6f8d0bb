"""Spearman's rank correlation as a mean over documents, so that intervals and paired drops apply to it."""

from __future__ import annotations

import math

import numpy as np

from dse.evaluation.statistics.intervals import Outcomes as Values

__all__ = ["cosine", "spearman", "spearman_outcomes"]


def spearman(first: Values, second: Values) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks; NaN if either side is constant.

    Args:
        first: Shape (documents,).
        second: Same shape.

    Source: Spearman (1904).
    """
    return _pearson(_ranks(first), _ranks(second))


def spearman_outcomes(first: Values, second: Values) -> Values:
    """One outcome per document whose mean is Spearman's correlation and whose spread gives its standard error.

    The outcomes are the pseudo-values of the jackknife, rho + (n - 1) (mean of the leave-one-out rhos - rho without
    document i), shifted so that their mean is rho itself. The difference between the outcomes of two models is the
    pseudo-value of the difference of their correlations, so Student's t on it is the jackknife interval of a paired
    drop. A single outcome has no meaning of its own and may lie outside [-1, 1].

    Args:
        first: Shape (documents,), at least three.
        second: Same shape.

    Source: Tukey (1958); Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 11.
    """
    first_ranks, second_ranks = _ranks(first), _ranks(second)
    rho = _pearson(first_ranks, second_ranks)
    without = np.array(
        [_pearson(_ranks_without(first_ranks, i), _ranks_without(second_ranks, i)) for i in range(first.size)]
    )
    without = np.where(np.isnan(without), rho, without)  # the remaining values are constant
    outcomes: Values = rho + (first.size - 1) * (without.mean() - without)
    return outcomes


def _ranks(values: Values) -> Values:
    """Ranks from 1; ties share their mean rank."""
    from scipy.stats import rankdata  # takes half a second to import, which reading a study does not need

    return np.asarray(rankdata(values), dtype=np.float64)


def _ranks_without(ranks: Values, index: int) -> Values:
    """Ranks of the other values after one is removed: higher ranks fall by one, ranks of its ties by half."""
    lowered = ranks - (ranks > ranks[index]) - 0.5 * (ranks == ranks[index])
    return np.delete(lowered, index)


def _pearson(first: Values, second: Values) -> float:
    """Pearson's correlation; NaN, without scipy's warning, if either side is constant."""
    return cosine(first - first.mean(), second - second.mean())


def cosine(first: Values, second: Values) -> float:
    """Cosine of the angle between two vectors; NaN if either is zero."""
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale > 0 else math.nan
