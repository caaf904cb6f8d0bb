from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.measurement.distribution import Distribution, paired_ratio, student_t_quantile

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50)


def test_distribution_closed_form():
    # 0, 1, ..., 100: the q-th percentile is q.
    spread = Distribution.of([float(value) for value in reversed(range(101))])
    assert (spread.median_s, spread.p10_s, spread.p90_s, spread.iqr_s) == pytest.approx((50, 10, 90, 50))
    assert (spread.minimum_s, spread.count) == (0, 101)


@given(TIMES)
def test_distribution_is_ordered_and_scales(samples):
    spread, doubled = Distribution.of(samples), Distribution.of([2 * sample for sample in samples])
    assert spread.minimum_s <= spread.p10_s <= spread.median_s <= spread.p90_s <= max(samples)
    assert spread.iqr_s >= 0
    assert doubled.median_s == pytest.approx(2 * spread.median_s)


def test_distribution_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got none"):
        Distribution.of([])


@pytest.mark.parametrize(
    ("degrees", "expected"), [(3, 3.1824), (5, 2.5706), (7, 2.3646), (15, 2.1314), (30, 2.0423), (1000, 1.9623)]
)
def test_student_quantile_against_the_printed_table(degrees, expected):
    assert student_t_quantile(0.975, degrees) == pytest.approx(expected, rel=0.01)


def test_exact_ratio_has_a_point_interval():
    interval = paired_ratio([2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0], seed=0)
    assert (interval.ratio, interval.low, interval.high) == pytest.approx((2, 2, 2))


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)), min_size=4, max_size=12), st.floats(0.1, 10))
def test_ratio_scales_inverts_and_lies_in_its_interval(pairs, factor):
    numerators, denominators = [a for a, _ in pairs], [b for _, b in pairs]
    plain = paired_ratio(numerators, denominators, seed=3, resamples=200)
    scaled = paired_ratio([factor * a for a in numerators], denominators, seed=3, resamples=200)
    inverse = paired_ratio(denominators, numerators, seed=3, resamples=200)
    assert plain.low <= plain.ratio * (1 + 1e-9)
    assert plain.ratio <= plain.high * (1 + 1e-9)
    assert scaled.high == pytest.approx(factor * plain.high)
    assert inverse.ratio == pytest.approx(1 / plain.ratio)
    assert inverse.low == pytest.approx(1 / plain.high)


def test_one_outlier_does_not_move_the_ratio():
    subject = [2.0] * 8
    subject[3] = 200.0
    assert paired_ratio(subject, [1.0] * 8, seed=0).ratio == 2.0


def test_same_seed_same_interval():
    generator = np.random.default_rng(0)
    subject, dense = generator.lognormal(size=8).tolist(), generator.lognormal(size=8).tolist()
    assert paired_ratio(subject, dense, seed=1) == paired_ratio(subject, dense, seed=1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """With eight pairs of log-normal noise a 95 % interval must hold the true ratio in about 95 of 100 runs."""
    generator = np.random.default_rng(1)
    truth, runs, held, widths = 0.8, 400, 0, []
    for run in range(runs):
        dense = np.exp(generator.normal(0, 0.03, 8))
        subject = truth * np.exp(generator.normal(0, 0.03, 8))
        interval = paired_ratio(subject.tolist(), dense.tolist(), seed=run, resamples=300)
        held += interval.low <= truth <= interval.high
        widths.append(math.log(interval.high / interval.low))
    # Binomial: the standard error at 0.95 is 0.011. The plain percentile interval holds 0.91 and fails here.
    assert 0.935 <= held / runs <= 0.995
    assert np.median(widths) < 0.12  # an interval that always holds by being wide would fail here


@pytest.mark.parametrize(("subject", "dense"), [([1.0] * 3, [1.0] * 3), ([1.0] * 5, [1.0] * 4)])
def test_too_few_or_unequal_pairs_are_refused(subject, dense):
    with pytest.raises(ValueError, match="four pairs"):
        paired_ratio(subject, dense, seed=0)
