"""McNemar and the paired bootstrap against scipy, closed forms, enumeration and simulation."""

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
    assert mcnemar(losses, gains) == p_value


@given(st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None)
def test_mcnemar_equals_the_binomial_test_of_scipy(losses: int, gains: int) -> None:
    expected = stats.binomtest(losses, losses + gains).pvalue if losses + gains else 1.0
    assert mcnemar(losses, gains) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_is_still_exact() -> None:
    assert mcnemar(2000, 2300) == pytest.approx(stats.binomtest(2000, 4300).pvalue, rel=1e-9)
    assert mcnemar(0, 5000) == 0.5**4999 == 0.0


def brute_force(losses: list[int], gains: list[int], shares: list[float]) -> float:
    """Every toss of every disagreement."""
    counted = [share for lost, gained, share in zip(losses, gains, shares, strict=True) for _ in range(lost + gained)]
    observed = abs(sum(s * (a - b) for a, b, s in zip(losses, gains, shares, strict=True)))
    tosses = list(itertools.product((-1, 1), repeat=len(counted)))
    extreme = sum(abs(sum(t * s for t, s in zip(toss, counted, strict=True))) >= observed - 1e-12 for toss in tosses)
    return extreme / len(tosses)


@pytest.mark.parametrize("shares", [[0.01, 0.01], [0.01, 0.03], [0.02, 0.0071]])
def test_a_mean_over_tasks_is_tested_by_every_toss(shares: list[float]) -> None:
    losses, gains = [5, 4], [1, 2]
    assert stratified_mcnemar(losses, gains, shares) == pytest.approx(brute_force(losses, gains, shares))


def test_tasks_whose_documents_count_alike_are_one() -> None:
    assert stratified_mcnemar([5, 9], [2, 1], [0.01, 0.01]) == mcnemar(14, 3)
    assert stratified_mcnemar([0, 9], [0, 1], [0.3, 0.01]) == mcnemar(9, 1)
    assert stratified_mcnemar([0], [0], [0.3]) == 1.0


def test_where_splits_are_too_many_tosses_are_drawn() -> None:
    losses, gains, shares = [60, 70, 50, 40], [45, 60, 40, 45], [0.001, 0.0013, 0.0007, 0.0021]
    drawn = stratified_mcnemar(losses, gains, shares)
    variance = sum(s**2 * (a + b) for a, b, s in zip(losses, gains, shares, strict=True))
    statistic = sum(s * (a - b) for a, b, s in zip(losses, gains, shares, strict=True))
    assert drawn == pytest.approx(2 * stats.norm.sf(statistic / math.sqrt(variance)), rel=0.05)
    assert drawn == stratified_mcnemar(losses, gains, shares)


def test_the_bootstrap_equals_that_of_scipy() -> None:
    values = np.random.default_rng(4).lognormal(0.0, 1.0, 80) - 1.2
    ours = paired_bootstrap([values], resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.standard_error == pytest.approx(stats.sem(values))


def test_the_p_value_is_where_the_interval_reaches_zero() -> None:
    values = np.random.default_rng(7).normal(0.25, 1.0, 70)
    found = paired_bootstrap([values])
    assert found.p_value is not None
    edge = paired_bootstrap([values], confidence=1 - found.p_value)
    assert edge.low == pytest.approx(0.0, abs=2e-3)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_the_bootstrap_covers_where_differences_are_skewed() -> None:
    random = np.random.default_rng(11)
    truth, covered, runs = math.exp(0.5), 0, 400
    for _ in range(runs):
        found = paired_bootstrap([random.lognormal(0.0, 1.0, 100)], resamples=600)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    # 95 % wanted; a normal interval reaches 0.90 here, and the error of this count is 0.012.
    assert covered / runs >= 0.905


def test_a_comparison_turned_round_is_the_mirror_image() -> None:
    random = np.random.default_rng(2)
    first, second = random.uniform(size=60), random.uniform(size=60)
    there, back = drop_with_test([first], [second]), drop_with_test([second], [first])
    assert there.test == BOOTSTRAP
    assert there.low is not None
    assert back.high is not None
    assert there.low == pytest.approx(-back.high)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.smallest_detectable == pytest.approx(back.smallest_detectable)
    assert drop_with_test([first], [second]) == there


def test_right_or_wrong_is_tested_by_mcnemar() -> None:
    dense = np.asarray([1.0] * 9 + [0.0] * 2 + [1.0] * 20 + [0.0] * 10)
    point = np.asarray([0.0] * 9 + [1.0] * 2 + [1.0] * 20 + [0.0] * 10)
    found, interval = drop_with_test([dense], [point]), paired_drop([dense], [point])
    assert (found.test, found.losses, found.gains, found.p_value) == (MCNEMAR, 9, 2, mcnemar(9, 2))
    assert (found.estimate, found.low, found.high) == (interval.estimate, interval.low, interval.high)
    assert found.documents == 41


def test_documents_without_both_outcomes_are_left_out() -> None:
    dense = np.asarray([1.0, 1.0, np.nan, 0.0, 1.0])
    point = np.asarray([0.0, np.nan, 1.0, 0.0, 1.0])
    found = drop_with_test([dense], [point])
    assert (found.documents, found.losses, found.gains) == (3, 1, 0)
    with pytest.raises(TaskError, match="at least one document"):
        drop_with_test([dense], [np.full(5, np.nan)])


def test_perplexity_agrees_with_the_delta_method() -> None:
    random = np.random.default_rng(3)
    words = random.integers(20, 200, 120).astype(float)
    dense = np.stack([-3.0 * words + random.normal(0, 9, 120), words], axis=1)
    point = dense.copy()
    point[:, 0] -= random.gamma(2.0, 0.02, 120) * words
    found, delta = perplexity_ratio_with_test([dense], [point]), paired_perplexity_ratio([dense], [point])
    assert found.estimate == pytest.approx(delta.estimate)
    assert found.low == pytest.approx(delta.low, rel=2e-3)
    assert found.high == pytest.approx(delta.high, rel=2e-3)
    assert found.smallest_detectable is not None
    assert 1.0 < found.smallest_detectable < found.estimate
    assert found.p_value is not None
    assert found.p_value < 0.001


def test_other_words_are_not_compared() -> None:
    with pytest.raises(TaskError, match="same words"):
        perplexity_ratio_with_test([np.ones((3, 2))], [np.full((3, 2), 2.0)])


def test_one_document_says_nothing_and_no_difference_is_none() -> None:
    alone = drop_with_test([np.asarray([0.4])], [np.asarray([0.1])])
    assert (alone.low, alone.high, alone.p_value, alone.smallest_detectable) == (None, None, None, None)
    same = perplexity_ratio_with_test([np.ones((5, 2))], [np.ones((5, 2))])
    assert (same.estimate, same.low, same.high, same.p_value) == (1.0, 1.0, 1.0, 1.0)
