"""Spread of repeated timings, and the confidence interval of a ratio of paired timings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["FEW_BLOCKS", "TRIM", "Distribution", "RatioInterval", "block_ratio"]

TRIM = 0.25
"""Share of the blocks trimmed at each end: midway between the mean (efficient) and the median (robust)."""

FEW_BLOCKS = 12
"""Below this many blocks the bootstrap alone is not reliable."""


@dataclass(frozen=True)
class Distribution:
    """Summary of repeated timings in seconds; quantiles interpolate linearly between samples.

    Attributes:
        p99_s: 99th percentile; close to the maximum with fewer than a hundred samples.
        iqr_s: Interquartile range.
        count: Number of samples, outliers included.
        outliers: Samples beyond 1.5 interquartile ranges from the quartiles (Tukey); all of them count above.
    """

    median_s: float
    p10_s: float
    p90_s: float
    p99_s: float
    iqr_s: float
    minimum_s: float
    maximum_s: float
    count: int
    outliers: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Distribution:
        """Summarise `samples` (seconds, at least one).

        Raises:
            ValueError: There is no sample.
        """
        if not samples:
            raise ValueError("`len(samples) >= 1` must hold, but got no samples")
        p10, p25, p50, p75, p90, p99 = (float(q) for q in np.quantile(samples, [0.10, 0.25, 0.50, 0.75, 0.90, 0.99]))
        fence_s = 1.5 * (p75 - p25)
        outliers = sum(1 for sample in samples if sample < p25 - fence_s or sample > p75 + fence_s)
        low, high = float(min(samples)), float(max(samples))
        return cls(p50, p10, p90, p99, p75 - p25, low, high, len(samples), outliers)


@dataclass(frozen=True)
class RatioInterval:
    """A ratio of paired timings with its 95 % interval; below 1 the first of the pair is faster."""

    ratio: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width relative to the ratio."""
        return (self.high - self.low) / (2 * self.ratio)


def block_ratio(blocks: Sequence[float], *, seed: int, resamples: int = 4000) -> RatioInterval:
    """Ratio of two paired series from the log ratios of their ABBA blocks, with a bootstrap interval.

    The ratio is exp(trimmed mean of the blocks). The bootstrap draws runs of neighbouring blocks (circular block
    bootstrap, runs of n^(1/3)), because disturbances on a machine outlast one block. With m runs drawn, the plain 95 %
    percentile interval covers too rarely for small m; its tails are moved out to those of Student's t with m - 1
    degrees of freedom and a variance divided by m - 1. Fewer than `FEW_BLOCKS` blocks cannot show their own tails by
    resampling; the interval then also covers the Student's t interval of their mean.

    Args:
        blocks: Log of candidate / baseline, one per block.
        seed: Seed of the resampling; the same seed and data give the same interval.
        resamples: Number of bootstrap samples.

    Raises:
        ValueError: Fewer than two blocks.

    Source: Hesterberg (2015), "What teachers should know about the bootstrap", expanded percentile intervals; Politis
    and Romano (1992), circular block bootstrap.
    """
    count = len(blocks)
    if count < 2:
        raise ValueError(f"at least two blocks are needed, but got {count}")
    logs = np.asarray(blocks, dtype=np.float64)
    run = max(1, round(count ** (1 / 3))) if count >= FEW_BLOCKS else 1
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, count, size=(resamples, math.ceil(count / run)))
    picks = (starts[:, :, None] + np.arange(run)) % count
    means = stats.trim_mean(logs[picks.reshape(resamples, -1)[:, :count]], TRIM, axis=-1)
    drawn = count // run
    tail = float(stats.norm.cdf(-stats.t.ppf(0.975, drawn - 1) * math.sqrt(drawn / (drawn - 1))))
    low, high = (float(end) for end in np.quantile(means, [tail, 1 - tail]))
    if count < FEW_BLOCKS:
        reach = float(stats.t.ppf(0.975, count - 1)) * float(logs.std(ddof=1)) / math.sqrt(count)
        low, high = min(low, float(logs.mean()) - reach), max(high, float(logs.mean()) + reach)
    return RatioInterval(math.exp(float(stats.trim_mean(logs, TRIM))), math.exp(low), math.exp(high))
