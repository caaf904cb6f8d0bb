"""Rank correlation and its per-document outcomes, against scipy and an explicit jackknife."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from dse.evaluation.statistics.intervals import paired_drop
from dse.evaluation.statistics.rank_correlation import spearman, spearman_outcomes

VALUES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=4, max_size=30)


@given(VALUES)
def test_correlation_agrees_with_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs, dtype=np.float64).T
    assume(len(set(first)) > 1 and len(set(second)) > 1)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@given(VALUES)
def test_outcomes_are_shifted_pseudo_values_of_the_jackknife(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs, dtype=np.float64).T
    n = len(first)
    left = [(np.delete(first, i), np.delete(second, i)) for i in range(n)]
    assume(all(len(set(values)) > 1 for pair in [(first, second), *left] for values in pair))
    without = np.array([stats.spearmanr(*pair).statistic for pair in left])
    rho = stats.spearmanr(first, second).statistic
    outcomes = spearman_outcomes(first, second)
    assert outcomes.mean() == pytest.approx(rho, abs=1e-9)
    np.testing.assert_allclose(outcomes - rho, (n - 1) * (without.mean() - without), atol=1e-9)
    # The jackknife variance of rho is the variance of the mean of the outcomes.
    jackknife = (n - 1) / n * ((without - without.mean()) ** 2).sum()
    assert outcomes.var(ddof=1) / n == pytest.approx(jackknife, abs=1e-9)


def test_constant_values_have_no_correlation() -> None:
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert spearman(np.arange(5.0), np.arange(5.0) ** 3) == 1.0
    assert spearman(np.arange(5.0), -np.arange(5.0)) == -1.0


def test_paired_drop_of_correlations_covers_the_true_drop() -> None:
    """Two noisy versions of one reference ranking: 95 % intervals cover the drop measured on many documents."""
    generator = np.random.default_rng(0)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        reference = generator.normal(size=n)
        shared = generator.normal(size=n)
        return reference, reference + 0.5 * shared, reference + 0.6 * shared + 0.5 * generator.normal(size=n)

    reference, dense, point = drawn(40_000)
    truth = spearman(dense, reference) - spearman(point, reference)
    hits = 0
    for _ in range(200):
        reference, dense, point = drawn(60)
        drop = paired_drop([spearman_outcomes(dense, reference)], [spearman_outcomes(point, reference)])
        assert drop.low is not None
        assert drop.high is not None
        hits += drop.low <= truth <= drop.high
    assert 180 <= hits <= 199
