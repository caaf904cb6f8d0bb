from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dse.measurement.timing_statistics import Distribution, block_ratio

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50)


def test_distribution_in_closed_form():
    # The q-th percentile of 0, 1, ..., 100 is q.
    spread = Distribution.of([float(value) for value in reversed(range(101))])
    assert (spread.median_s, spread.p10_s, spread.p90_s, spread.iqr_s) == pytest.approx((50, 10, 90, 50))
    assert (spread.minimum_s, spread.count) == (0, 101)


@given(TIMES)
def test_distribution_is_ordered_and_scales(samples):
    spread, doubled = Distribution.of(samples), Distribution.of([2 * sample for sample in samples])
    assert spread.minimum_s <= spread.p10_s <= spread.median_s <= spread.p90_s <= max(samples)
    assert spread.iqr_s >= 0
    assert doubled.median_s == pytest.approx(2 * spread.median_s)


def test_an_empty_distribution_is_refused():
    with pytest.raises(ValueError, match="got no samples"):
        Distribution.of([])


def test_equal_blocks_give_an_interval_of_zero_width():
    interval = block_ratio([math.log(2.0)] * 4, seed=0)
    assert (interval.ratio, interval.low, interval.high) == pytest.approx((2, 2, 2))
    assert interval.half_width == pytest.approx(0, abs=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=30), st.floats(0.1, 10))
def test_ratio_scales_inverts_and_lies_in_its_interval(blocks, factor):
    plain = block_ratio(blocks, seed=3, resamples=200)
    scaled = block_ratio([block + math.log(factor) for block in blocks], seed=3, resamples=200)
    inverse = block_ratio([-block for block in blocks], seed=3, resamples=200)
    assert plain.low <= plain.high
    assert scaled.high == pytest.approx(factor * plain.high)
    assert inverse.ratio == pytest.approx(1 / plain.ratio)
    assert inverse.low == pytest.approx(1 / plain.high)


def test_the_ratio_is_a_trimmed_mean():
    # Trimming a quarter at each end of eight values leaves 2, 3, 4, 5; of three values nothing is trimmed.
    assert block_ratio([7.0, 0, 1, 2, 3, 4, 5, 600], seed=0, resamples=10).ratio == pytest.approx(math.exp(3.5))
    assert block_ratio([1.0, 2.0, 9.0], seed=0, resamples=10).ratio == pytest.approx(math.exp(4.0))


def test_one_outlier_does_not_move_the_ratio():
    blocks = [math.log(2.0)] * 8
    blocks[3] = math.log(200.0)
    assert block_ratio(blocks, seed=0).ratio == pytest.approx(2.0)


def test_outliers_are_counted_and_not_removed():
    spread = Distribution.of([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 9.0])
    assert (spread.outliers, spread.count, spread.maximum_s) == (1, 8, 9.0)
    assert Distribution.of([1.0] * 5).outliers == 0


def test_the_same_seed_gives_the_same_interval():
    blocks = np.random.default_rng(0).normal(size=9).tolist()
    assert block_ratio(blocks, seed=1) == block_ratio(blocks, seed=1)


@pytest.mark.parametrize(("blocks", "least"), [(2, 0.93), (4, 0.93), (8, 0.93), (12, 0.93), (40, 0.93)])
def test_the_interval_has_its_nominal_coverage(blocks, least):
    """With log-normal noise a 95 % interval must cover the true ratio in about 95 % of runs, even for few blocks."""
    generator = np.random.default_rng(1)
    runs, covered, widths = 600, 0, []
    for run in range(runs):
        interval = block_ratio((math.log(0.8) + generator.normal(0, 0.03, blocks)).tolist(), seed=run, resamples=300)
        covered += interval.low <= 0.8 <= interval.high
        widths.append(math.log(interval.high / interval.low))
    assert least <= covered / runs <= 0.995  # binomial standard error at 0.95: 0.009
    # An interval that covers by being too wide fails here: at most 1.5 times the t interval of the mean.
    assert np.median(widths) < 1.5 * 2 * stats.t.ppf(0.975, blocks - 1) * 0.03 / math.sqrt(blocks)


def test_disturbances_that_outlast_a_block_widen_the_interval():
    """Neighbouring blocks are correlated, so resampling single blocks would give intervals that are too narrow."""
    generator = np.random.default_rng(2)
    covered = 0
    for run in range(300):
        noise = generator.normal(0, 0.03, 61)
        blocks = (noise[1:] + noise[:-1]) / math.sqrt(2)  # correlation 0.5 with the next block
        interval = block_ratio(blocks.tolist(), seed=run, resamples=300)
        covered += interval.low <= 1 <= interval.high
    assert covered / 300 >= 0.88


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="at least two blocks"):
        block_ratio([0.0], seed=0)
