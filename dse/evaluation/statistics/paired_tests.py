"""Tests of paired differences over documents: exact McNemar for 0/1 outcomes, a paired bootstrap for everything else.

The bootstrap's intervals are BCa (bias-corrected and accelerated, Efron 1987) and not plain percentiles: differences of
log-likelihoods are skewed, and BCa corrects for skewness and bias at the same cost. Its levels are widened as Student's
t is against the normal (Hesterberg 2015), without which intervals of few documents are too narrow. It is seeded: the
same outcomes always give the same interval, and a comparison turned round gives the mirrored one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import special

from dse.errors import TaskError
from dse.evaluation.statistics.intervals import (
    Outcomes,
    PairedDrop,
    PairedRatio,
    is_binary,
    paired_drop,
    paired_present,
    shares_of,
    student_quantile,
)
from dse.evaluation.statistics.power import smallest_detectable_change, smallest_detectable_drop

__all__ = [
    "BOOTSTRAP",
    "MCNEMAR",
    "BootstrapResult",
    "drop_with_test",
    "mcnemar",
    "paired_bootstrap",
    "perplexity_ratio_with_test",
    "stratified_mcnemar",
]

MCNEMAR, BOOTSTRAP = "exact McNemar", "paired bootstrap"

_RESAMPLES = 4000
_INDICES_AT_ONCE = 2_000_000
_ENUMERATED = 2_000_000
_NORMAL = NormalDist()


def mcnemar(losses: int, gains: int) -> float:
    """Two-sided exact McNemar test: P(a split at least as uneven), each disagreement being a fair coin's toss.

    Args:
        losses: Documents that only the first model gets right.
        gains: Documents that only the second gets right.

    Returns:
        The p-value, exact to the last bit: integers are summed, and divided once.

    Source: McNemar (1947), Psychometrika 12:153; the exact form conditions on the number of disagreements.
    """
    discordant, tail = losses + gains, _tail(losses, gains)
    return min(1.0, 2 * tail / (1 << discordant))


def stratified_mcnemar(losses: Sequence[int], gains: Sequence[int], shares: Sequence[float], *, seed: int = 0) -> float:
    """McNemar's test for a weighted mean over tasks: under no difference every disagreement is a fair coin's toss.

    The statistic is the sum of share x (losses - gains). Tasks whose documents count alike are one; where the others
    allow too many splits to enumerate, a million tosses are drawn by seed.

    Args:
        losses: Per task.
        gains: Per task.
        shares: What one document counts in the mean, per task.
        seed: Of the draws.
    """
    pooled: dict[float, list[int]] = {}
    for lost, gained, share in zip(losses, gains, shares, strict=True):
        near = next((known for known in pooled if math.isclose(known, share, rel_tol=1e-9)), share)
        entry = pooled.setdefault(near, [0, 0])
        entry[0], entry[1] = entry[0] + lost, entry[1] + gained
    kept = {share: (lost, gained) for share, (lost, gained) in pooled.items() if lost + gained}
    if len(kept) <= 1:
        return mcnemar(*next(iter(kept.values()), (0, 0)))
    observed = abs(sum(share * (lost - gained) for share, (lost, gained) in kept.items()))
    edge = observed * (1 - 1e-9)
    sizes = [lost + gained for lost, gained in kept.values()]
    if math.prod(size + 1 for size in sizes) <= _ENUMERATED:
        statistic, weight = np.zeros(1), np.ones(1)
        for share, size in zip(kept, sizes, strict=True):
            tosses = np.arange(size + 1)
            chances = np.array([math.comb(size, k) / (1 << size) for k in range(size + 1)])
            statistic = np.add.outer(statistic, share * (2 * tosses - size)).ravel()
            weight = np.multiply.outer(weight, chances).ravel()
        return min(1.0, float(weight[np.abs(statistic) >= edge].sum()))
    generator = np.random.default_rng(seed)
    draws = 1_000_000
    drawn = sum(
        share * (2.0 * generator.binomial(size, 0.5, draws) - size) for share, size in zip(kept, sizes, strict=True)
    )
    return (1 + int((np.abs(drawn) >= edge).sum())) / (1 + draws)


@dataclass(frozen=True)
class BootstrapResult:
    """A statistic with its BCa interval and two-sided p-value of zero; None where one document says nothing.

    Attributes:
        value: Weighted mean over tasks of the sum of values over the sum of units.
        low: Lower end.
        high: Upper end.
        p_value: At which the interval would just reach zero.
        standard_error: By the delta method.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    standard_error: float | None


def paired_bootstrap(
    values: Sequence[Outcomes],
    units: Sequence[Outcomes] | None = None,
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> BootstrapResult:
    """Weighted mean over tasks of sum(values) / sum(units); documents are drawn again within each task.

    Args:
        values: One array (documents,) per task: differences between two models on the same document.
        units: What each difference is divided by, such as words; one a document by default.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.
        resamples: Times that documents are drawn.
        seed: Of the draws.

    Source: Efron (1987), Journal of the American Statistical Association 82:171 (BCa); the acceleration of several
    samples from empirical influence values as in Davison and Hinkley (1997), chapter 5; the levels of small samples
    from Hesterberg (2015), The American Statistician 69:371.
    """
    shares = shares_of(len(values), weights)
    divisors = [np.ones_like(array) for array in values] if units is None else list(units)
    ratios = [float(array.sum() / unit.sum()) for array, unit in zip(values, divisors, strict=True)]
    estimate = float(sum(share * ratio for share, ratio in zip(shares, ratios, strict=True)))
    if any(array.size < 2 for array in values):
        return BootstrapResult(estimate, None, None, None, None)
    influence = [
        share * (array - ratio * unit) / unit.sum()
        for share, array, unit, ratio in zip(shares, values, divisors, ratios, strict=True)
    ]
    squares = sum(float(part @ part) for part in influence)
    variance = sum(part.size / (part.size - 1) * float(part @ part) for part in influence)
    if squares == 0.0:
        return BootstrapResult(estimate, estimate, estimate, 1.0 if estimate == 0 else 0.0, 0.0)
    acceleration = sum(float((part**3).sum()) for part in influence) / (6 * squares**1.5)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for share, array, unit in zip(shares, values, divisors, strict=True):
        drawn += share * _resampled(array, unit, resamples, generator)
    bias = _NORMAL.inv_cdf(_share_below(drawn, estimate))
    # A resample's variance is (n - 1) / n of the sample's, and the sample's is itself an estimate.
    degrees = sum(array.size - 1 for array in values)
    widening = math.sqrt((degrees + 1) / degrees)
    tail = widening * student_quantile((1 + confidence) / 2, degrees)
    low, high = (float(np.quantile(drawn, _bca_level(z, bias, acceleration))) for z in (-tail, tail))
    z = _unshifted(_NORMAL.inv_cdf(_share_below(drawn, 0.0)), bias, acceleration)
    p_value = max(2 * float(special.stdtr(degrees, -abs(z) / widening)), 1.0 / resamples)
    return BootstrapResult(estimate, low, high, min(1.0, p_value), math.sqrt(variance))


def drop_with_test(
    dense: Sequence[Outcomes],
    point: Sequence[Outcomes],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> PairedDrop:
    """Drop of the weighted mean from dense to point with its test: McNemar for 0/1 outcomes, else the bootstrap.

    Under McNemar the interval is that of `paired_drop`; test and interval are different procedures and may disagree
    where the p-value is close to one minus the confidence.

    Args:
        dense: One array (documents,) per task.
        point: Arrays of the same shapes: the same documents in the same order.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.

    Raises:
        TaskError: The arrays do not have the same shapes, or have no document in common.
    """
    pairs = paired_present(dense, point)
    differences = [before - after for before, after in pairs]
    if not all(is_binary(before) and is_binary(after) for before, after in pairs):
        found = paired_bootstrap(differences, None, weights, confidence=confidence)
        documents = sum(array.size for array in differences)
        detectable = smallest_detectable_change(found.standard_error)
        return PairedDrop(found.value, found.low, found.high, documents, found.p_value, detectable, BOOTSTRAP)
    losses, gains = ([int((sign * array > 0).sum()) for array in differences] for sign in (1, -1))
    shares = [
        float(share) / array.size for share, array in zip(shares_of(len(pairs), weights), differences, strict=True)
    ]
    return dataclasses.replace(
        paired_drop(dense, point, weights, confidence),
        p_value=stratified_mcnemar(losses, gains, shares),
        smallest_detectable=_detectable(losses, gains, shares, [array.size for array in differences]),
        test=MCNEMAR,
        losses=sum(losses),
        gains=sum(gains),
    )


def perplexity_ratio_with_test(
    dense: Sequence[Outcomes],
    point: Sequence[Outcomes],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> PairedRatio:
    """Perplexity of point over dense with the paired bootstrap, taken in the logarithm.

    Args:
        dense: One array (documents, 2) per task: log-likelihood (nats), words.
        point: Arrays of the same shapes: the same documents in the same order.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.

    Raises:
        TaskError: The arrays do not have the same shapes, differ in their words, or have no document in common.
    """
    pairs = paired_present(dense, point)
    if not all(np.array_equal(before[:, 1], after[:, 1]) for before, after in pairs):
        raise TaskError("paired outcomes must count the same words, but they differ; evaluate the same documents")
    losses = [before[:, 0] - after[:, 0] for before, after in pairs]
    words = [before[:, 1] for before, _ in pairs]
    found = paired_bootstrap(losses, words, weights, confidence=confidence)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    detectable = smallest_detectable_change(found.standard_error)
    return PairedRatio(
        value=math.exp(found.value),
        low=low,
        high=high,
        documents=sum(array.size for array in words),
        p_value=found.p_value,
        smallest_detectable=None if detectable is None else math.exp(detectable),
        test=BOOTSTRAP,
    )


def _tail(losses: int, gains: int) -> int:
    """Ways in which the rarer side of the disagreements is at most as frequent as it was."""
    discordant, ways = losses + gains, 1
    total = ways
    for k in range(1, min(losses, gains) + 1):
        ways = ways * (discordant - k + 1) // k
        total += ways
    return total


def _detectable(
    losses: Sequence[int], gains: Sequence[int], shares: Sequence[float], sizes: Sequence[int]
) -> float | None:
    """Exact where all documents count alike; else from the standard error of the mean under the observed rates."""
    if all(math.isclose(share, shares[0], rel_tol=1e-9) for share in shares):
        return smallest_detectable_drop(sum(losses) + sum(gains), sum(sizes))
    variance = sum(share**2 * (lost + gained + 2) for share, lost, gained in zip(shares, losses, gains, strict=True))
    return smallest_detectable_change(math.sqrt(variance))


def _resampled(values: Outcomes, units: Outcomes, resamples: int, generator: np.random.Generator) -> Outcomes:
    """sum(values) / sum(units) of documents drawn with replacement, shape (resamples,)."""
    documents = values.size
    rows = max(1, _INDICES_AT_ONCE // documents)
    is_constant = bool((units == units[0]).all())
    parts = []
    for begin in range(0, resamples, rows):
        drawn = generator.integers(0, documents, (min(rows, resamples - begin), documents))
        total = documents * units[0] if is_constant else units[drawn].sum(axis=1)
        parts.append(values[drawn].sum(axis=1) / total)
    return np.concatenate(parts)


def _share_below(drawn: Outcomes, value: float) -> float:
    """Share of the resamples below a value, ties counting half; kept off 0 and 1, which have no normal quantile."""
    share = float((drawn < value).mean() + (drawn == value).mean() / 2)
    return min(max(share, 0.5 / drawn.size), 1 - 0.5 / drawn.size)


def _bca_level(z: float, bias: float, acceleration: float) -> float:
    """Which quantile of the resamples stands for the normal quantile z."""
    shifted = bias + z
    return _NORMAL.cdf(bias + shifted / max(1e-3, 1 - acceleration * shifted))


def _unshifted(zero: float, bias: float, acceleration: float) -> float:
    """The normal quantile whose BCa level falls on a given quantile of the resamples: the inverse of `_bca_level`."""
    shift = zero - bias
    return shift / max(1e-3, 1 + acceleration * shift) - bias
