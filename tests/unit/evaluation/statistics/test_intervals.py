"""Intervals against closed forms, coverage by simulation, the bootstrap and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dse.errors import TaskError
from dse.evaluation import mean_interval, paired_drop, paired_perplexity_ratio, perplexity_interval
from dse.evaluation.statistics.intervals import student_interval, wilson_interval

Z = stats.norm.ppf(0.975)


@pytest.mark.parametrize("documents", [2, 3, 4, 5, 8, 31, 200, 5001, 200_001])
@pytest.mark.parametrize("confidence", [0.2, 0.8, 0.95, 0.999])
def test_student_interval_agrees_with_scipy(documents: int, confidence: float) -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, documents)
    expected = stats.t.interval(confidence, documents - 1, values.mean(), stats.sem(values))
    found = student_interval(values, confidence)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-7)
    assert (found.value, found.documents) == (values.mean(), documents)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_in_closed_form(counts: tuple[int, int]) -> None:
    successes, documents = counts
    share, scale = successes / documents, 1 + Z * Z / documents
    centre = (share + Z * Z / (2 * documents)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / documents + Z * Z / (4 * documents**2))
    found = wilson_interval(successes, documents)
    assert (found.value, found.documents) == (share, documents)
    assert found.low == pytest.approx(max(0.0, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1.0, centre + half), abs=1e-9)


def test_mean_over_one_task_has_the_interval_of_that_task() -> None:
    outcomes = np.asarray([1.0] * 30 + [0.0] * 10)
    assert tuple(vars(mean_interval([outcomes])).values()) == pytest.approx(
        tuple(vars(wilson_interval(30, 40)).values())
    )
    graded = np.linspace(0.1, 0.9, 25)
    expected = stats.t.interval(0.95, 24, graded.mean(), stats.sem(graded))
    found = mean_interval([graded])
    assert (found.low, found.high) == pytest.approx(expected)


def test_mean_over_tasks_is_weighted_and_variances_add() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.2, 0.1, 400), rng.normal(0.7, 0.3, 900)
    found = mean_interval([first, second], [1.0, 3.0])
    assert found.value == pytest.approx(0.25 * first.mean() + 0.75 * second.mean())
    error = math.hypot(0.25 * stats.sem(first), 0.75 * stats.sem(second))
    assert found.high is not None
    assert found.high - found.value == pytest.approx(Z * error, rel=0.01)
    assert found.documents == 1300


def test_paired_drop_in_closed_form() -> None:
    # 7 losses and 3 gains among 40 documents; Bonett and Price's formula by hand.
    dense = np.asarray([1.0] * 7 + [0.0] * 3 + [1.0] * 20 + [0.0] * 10)
    point = np.asarray([0.0] * 7 + [1.0] * 3 + [1.0] * 20 + [0.0] * 10)
    lost, gained = 8 / 42, 4 / 42
    half = Z * math.sqrt((lost + gained - (lost - gained) ** 2) / 42)
    found = paired_drop([dense], [point])
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(lost - gained - half)
    assert found.high == pytest.approx(lost - gained + half)
    assert found.documents == 40


@pytest.mark.parametrize("documents", [1, 2, 50, 500])
def test_no_change_has_a_width_that_shrinks_with_documents(documents: int) -> None:
    same = np.ones(documents)
    found = paired_drop([same], [same])
    assert found.value == 0.0
    assert found.low is not None
    assert found.high is not None
    assert found.low == pytest.approx(-found.high)
    assert found.high == pytest.approx(min(1.0, Z * math.sqrt(2) / (documents + 2)), rel=1e-6)
    graded = np.full(max(documents, 2), 0.3)
    unchanged = paired_drop([graded], [graded])
    assert unchanged.high is not None
    assert unchanged.high > 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_drop_lies_in_its_interval_and_swapping_models_mirrors_it(pairs: list[tuple[bool, bool]]) -> None:
    dense, point = np.asarray(pairs, dtype=np.float64).T
    found, swapped = paired_drop([dense], [point]), paired_drop([point], [dense])
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-found.value, -found.high, -found.low))


@pytest.mark.parametrize(
    ("both", "lost", "gained", "documents"), [(0.5, 0.1, 0.05, 60), (0.6, 0.02, 0.01, 200), (0.3, 0.15, 0.15, 30)]
)
def test_paired_drop_covers_the_true_drop(both: float, lost: float, gained: float, documents: int) -> None:
    rng = np.random.default_rng(1)
    kinds = rng.choice(4, size=(4000, documents), p=[both, lost, gained, 1 - both - lost - gained])
    dense, point = ((kinds == 0) | (kinds == 1)).astype(float), ((kinds == 0) | (kinds == 2)).astype(float)
    covered = 0
    for before, after in zip(dense, point, strict=True):
        found = paired_drop([before], [after])
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= lost - gained <= found.high
    assert 0.935 <= covered / 4000 <= 0.99


def test_drop_over_two_tasks_covers_the_true_drop_and_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(2)

    def draw(documents: int, drop: float) -> tuple[np.ndarray, np.ndarray]:
        dense = (rng.random(documents) < 0.7).astype(float)
        return dense, dense * (rng.random(documents) >= drop / 0.7)

    covered = 0
    for _ in range(1000):
        (d1, p1), (d2, p2) = draw(80, 0.05), draw(150, 0.1)
        found = paired_drop([d1, d2], [p1, p2], [2.0, 1.0])
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= (2 * 0.05 + 0.1) / 3 <= found.high
    assert 0.93 <= covered / 1000 <= 0.985

    (d1, p1), (d2, p2) = draw(800, 0.05), draw(1500, 0.1)
    found = paired_drop([d1, d2], [p1, p2], [2.0, 1.0])
    first, second = (rng.choice(d - p, (4000, d.size)).mean(1) for d, p in ((d1, p1), (d2, p2)))
    expected = np.quantile((2 * first + second) / 3, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.003)


def test_graded_drop_agrees_with_a_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    dense = rng.random(60)
    point = dense - rng.normal(0.02, 0.05, 60)
    expected = stats.ttest_rel(dense, point).confidence_interval(0.95)
    found = paired_drop([dense], [point])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(4)
    dense = (rng.random(500) < 0.6).astype(float)
    point = np.where(rng.random(500) < 0.04, 1 - dense, dense)
    found, alone = paired_drop([dense], [point]), mean_interval([dense])
    assert found.high is not None
    assert found.low is not None
    assert alone.high is not None
    assert alone.low is not None
    assert found.high - found.low < 0.5 * (alone.high - alone.low)


def texts(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(dense, point, true log ratio): documents of varying length and difficulty; the point loses 0.2 nats per word."""
    words = rng.integers(20, 400, documents).astype(float)
    difficulty = rng.normal(3.5, 0.5, documents)
    loss = rng.normal(0.2, 0.15, documents)
    dense = np.stack([-difficulty * words, words], axis=1)
    point = np.stack([-(difficulty + loss) * words, words], axis=1)
    return dense, point, 0.2


def test_perplexity_ratio_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(1500):
        dense, point, truth = texts(rng, 40)
        found = paired_perplexity_ratio([dense], [point])
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= math.exp(truth) <= found.high
    assert 0.925 <= covered / 1500 <= 0.97


def test_perplexity_intervals_agree_with_the_bootstrap() -> None:
    rng = np.random.default_rng(6)
    dense, point, _ = texts(rng, 300)
    draws = rng.integers(0, 300, (4000, 300))
    words = dense[draws, 1].sum(1)
    found = paired_perplexity_ratio([dense], [point])
    expected = np.quantile(np.exp(-(point[draws, 0].sum(1) - dense[draws, 0].sum(1)) / words), (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx(expected, rel=0.01)
    alone = perplexity_interval([dense])
    expected = np.quantile(np.exp(-dense[draws, 0].sum(1) / words), (0.025, 0.975))
    assert (alone.low, alone.high) == pytest.approx(expected, rel=0.01)
    assert alone.value == pytest.approx(math.exp(-dense[:, 0].sum() / dense[:, 1].sum()))


def test_perplexity_over_tasks_is_the_geometric_mean() -> None:
    first, second = np.asarray([[-2.0, 1.0], [-2.0, 1.0]]), np.asarray([[-8.0, 2.0], [-8.0, 2.0]])
    assert perplexity_interval([first, second], [3.0, 1.0]).value == pytest.approx(math.exp((3 * 2 + 4) / 4))
    ratio = paired_perplexity_ratio([first, second], [first, second])
    assert (ratio.value, ratio.low, ratio.high, ratio.documents) == pytest.approx((1.0, 1.0, 1.0, 4))


def test_single_document_has_no_interval() -> None:
    one = np.asarray([[-2.0, 1.0]])
    assert (perplexity_interval([one]).low, paired_perplexity_ratio([one], [one]).high) == (None, None)
    assert mean_interval([np.asarray([0.5])]).low is None
    assert paired_drop([np.asarray([0.5])], [np.asarray([0.4])]).low is None


def test_documents_without_an_outcome_are_ignored() -> None:
    dense, point = np.asarray([1.0, math.nan, 1.0, 0.0]), np.asarray([0.0, 1.0, math.nan, 0.0])
    found = paired_drop([dense], [point])
    assert (found.value, found.documents) == (0.5, 2)
    assert mean_interval([dense]).documents == 3
    with pytest.raises(TaskError, match="at least one document"):
        mean_interval([np.asarray([math.nan])])


def test_different_documents_are_refused() -> None:
    with pytest.raises(TaskError, match="same documents"):
        paired_drop([np.ones(3)], [np.ones(4)])
    with pytest.raises(TaskError, match="same words"):
        paired_perplexity_ratio([np.ones((2, 2))], [np.full((2, 2), 2.0)])
    with pytest.raises(TaskError, match="have one positive weight"):
        mean_interval([np.ones(3)], [0.0])
    with pytest.raises(TaskError, match="have one positive weight"):
        paired_drop([], [])
