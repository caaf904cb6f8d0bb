"""McNemar's test and the paired bootstrap against scipy, closed forms, enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dse.errors import TaskError
from dse.evaluation.statistics.intervals import paired_drop, paired_perplexity_ratio
from dse.evaluation.statistics.paired_tests import (
    BOOTSTRAP,
    MCNEMAR,
    drop_with_test,
    mcnemar,
    paired_bootstrap,
    perplexity_ratio_with_test,
    stratified_mcnemar,
)


@pytest.mark.parametrize(
    ("losses", "gains", "p_value"), [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (0, 6, 2 / 64), (3, 1, 10 / 16)]
)
def test_mcnemar_in_closed_form(losses: int, gains: int, p_value: float) -> None:
    assert mcnemar(losses, gains) == pytest.approx(p_value, rel=1e-12)


def integer_sum(losses: int, gains: int) -> float:
    """The exact p-value by integer arithmetic."""
    discordant, rarer = losses + gains, min(losses, gains)
    ways = sum(math.comb(discordant, k) for k in range(rarer + 1))
    return min(1.0, 2 * ways / (1 << discordant))


@given(st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None)
def test_mcnemar_agrees_with_integer_arithmetic(losses: int, gains: int) -> None:
    assert mcnemar(losses, gains) == pytest.approx(integer_sum(losses, gains), rel=1e-9)


def test_mcnemar_is_exact_for_thousands_of_documents() -> None:
    assert mcnemar(2000, 2300) == pytest.approx(integer_sum(2000, 2300), rel=1e-9)
    assert mcnemar(0, 5000) == 0.5**4999 == 0.0


def brute_force(losses: list[int], gains: list[int], shares: list[float]) -> float:
    """The p-value over all outcomes of all disagreements."""
    counted = [share for lost, gained, share in zip(losses, gains, shares, strict=True) for _ in range(lost + gained)]
    observed = abs(sum(s * (a - b) for a, b, s in zip(losses, gains, shares, strict=True)))
    tosses = list(itertools.product((-1, 1), repeat=len(counted)))
    extreme = sum(abs(sum(t * s for t, s in zip(toss, counted, strict=True))) >= observed - 1e-12 for toss in tosses)
    return extreme / len(tosses)


@pytest.mark.parametrize("shares", [[0.01, 0.01], [0.01, 0.03], [0.02, 0.0071]])
def test_weighted_mean_over_tasks_agrees_with_brute_force(shares: list[float]) -> None:
    losses, gains = [5, 4], [1, 2]
    assert stratified_mcnemar(losses, gains, shares) == pytest.approx(brute_force(losses, gains, shares))


def test_tasks_with_equal_shares_per_document_are_pooled() -> None:
    assert stratified_mcnemar([5, 9], [2, 1], [0.01, 0.01]) == mcnemar(14, 3)
    assert stratified_mcnemar([0, 9], [0, 1], [0.3, 0.01]) == mcnemar(9, 1)
    assert stratified_mcnemar([0], [0], [0.3]) == 1.0


def test_too_many_outcomes_are_sampled_by_seed() -> None:
    losses, gains, shares = [60, 70, 50, 40], [45, 60, 40, 45], [0.001, 0.0013, 0.0007, 0.0021]
    drawn = stratified_mcnemar(losses, gains, shares)
    variance = sum(s**2 * (a + b) for a, b, s in zip(losses, gains, shares, strict=True))
    statistic = sum(s * (a - b) for a, b, s in zip(losses, gains, shares, strict=True))
    assert drawn == pytest.approx(2 * stats.norm.sf(statistic / math.sqrt(variance)), rel=0.05)
    assert drawn == stratified_mcnemar(losses, gains, shares)


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(4).lognormal(0.0, 1.0, 80) - 1.2
    ours = paired_bootstrap([values], resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert ours.value == pytest.approx(values.mean())
    assert ours.standard_error == pytest.approx(stats.sem(values))


def test_p_value_is_the_level_at_which_the_interval_reaches_zero() -> None:
    values = np.random.default_rng(7).normal(0.25, 1.0, 70)
    found = paired_bootstrap([values])
    assert found.p_value is not None
    edge = paired_bootstrap([values], confidence=1 - found.p_value)
    assert edge.low == pytest.approx(0.0, abs=2e-3)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_bootstrap_covers_the_mean_of_skewed_differences() -> None:
    random = np.random.default_rng(11)
    truth, covered, runs = math.exp(0.5), 0, 400
    for _ in range(runs):
        found = paired_bootstrap([random.lognormal(0.0, 1.0, 100)], resamples=600)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    # The nominal coverage is 0.95; a normal interval reaches 0.90 here, and this estimate has an error of 0.012.
    assert covered / runs >= 0.905


def test_swapping_the_models_mirrors_the_interval() -> None:
    random = np.random.default_rng(2)
    first, second = random.uniform(size=60), random.uniform(size=60)
    drop, swapped = drop_with_test([first], [second]), drop_with_test([second], [first])
    assert drop.test == BOOTSTRAP
    assert drop.low is not None
    assert swapped.high is not None
    assert drop.low == pytest.approx(-swapped.high)
    assert drop.p_value == pytest.approx(swapped.p_value)
    assert drop.smallest_detectable == pytest.approx(swapped.smallest_detectable)
    assert drop_with_test([first], [second]) == drop


def test_binary_outcomes_are_tested_by_mcnemar() -> None:
    dense = np.asarray([1.0] * 9 + [0.0] * 2 + [1.0] * 20 + [0.0] * 10)
    point = np.asarray([0.0] * 9 + [1.0] * 2 + [1.0] * 20 + [0.0] * 10)
    found, interval = drop_with_test([dense], [point]), paired_drop([dense], [point])
    assert (found.test, found.losses, found.gains, found.p_value) == (MCNEMAR, 9, 2, mcnemar(9, 2))
    assert (found.value, found.low, found.high) == (interval.value, interval.low, interval.high)
    assert found.documents == 41


def test_documents_without_both_outcomes_are_ignored() -> None:
    dense = np.asarray([1.0, 1.0, np.nan, 0.0, 1.0])
    point = np.asarray([0.0, np.nan, 1.0, 0.0, 1.0])
    found = drop_with_test([dense], [point])
    assert (found.documents, found.losses, found.gains) == (3, 1, 0)
    with pytest.raises(TaskError, match="at least one document"):
        drop_with_test([dense], [np.full(5, np.nan)])


def test_perplexity_ratio_agrees_with_the_delta_method() -> None:
    random = np.random.default_rng(3)
    words = random.integers(20, 200, 120).astype(float)
    dense = np.stack([-3.0 * words + random.normal(0, 9, 120), words], axis=1)
    point = dense.copy()
    point[:, 0] -= random.gamma(2.0, 0.02, 120) * words
    found, delta = perplexity_ratio_with_test([dense], [point]), paired_perplexity_ratio([dense], [point])
    assert found.value == pytest.approx(delta.value)
    assert found.low == pytest.approx(delta.low, rel=2e-3)
    assert found.high == pytest.approx(delta.high, rel=2e-3)
    assert found.smallest_detectable is not None
    assert 1.0 < found.smallest_detectable < found.value
    assert found.p_value is not None
    assert found.p_value < 0.001


def test_different_word_counts_are_refused() -> None:
    with pytest.raises(TaskError, match="same words"):
        perplexity_ratio_with_test([np.ones((3, 2))], [np.full((3, 2), 2.0)])


def test_single_document_has_no_test_and_equal_outcomes_have_p_value_1() -> None:
    alone = drop_with_test([np.asarray([0.4])], [np.asarray([0.1])])
    assert (alone.low, alone.high, alone.p_value, alone.smallest_detectable) == (None, None, None, None)
    same = perplexity_ratio_with_test([np.ones((5, 2))], [np.ones((5, 2))])
    assert (same.value, same.low, same.high, same.p_value) == (1.0, 1.0, 1.0, 1.0)
