"""Tests of paired differences over documents: exact McNemar for 0/1 outcomes, a paired bootstrap for all others.

The bootstrap intervals are BCa (bias-corrected and accelerated, Efron 1987) rather than percentile intervals:
differences of log-likelihoods are skewed, and BCa corrects for skewness and bias at the same cost. The BCa levels are
widened as Student's t is against the normal (Hesterberg 2015); without that, intervals over few documents are too
narrow. The bootstrap is seeded: the same outcomes always give the same interval, and swapping the two models gives the
mirror image.

`scipy.stats.bootstrap` is not used here. It has neither the p-value (the level at which the interval reaches zero) nor
the widened levels, it takes the acceleration from a jackknife whose cost is quadratic in the documents, and a weighted
mean of ratios over tasks would have to be resampled through index arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from dse.evaluation.statistics.intervals import (
    Interval,
    Outcomes,
    PairedDrop,
    PairedRatio,
    Weights,
    exponential,
    is_binary,
    normal_quantile,
    paired_drop,
    paired_losses,
    paired_outcomes,
    task_shares,
)
from dse.evaluation.statistics.power import smallest_detectable_change, smallest_detectable_drop

__all__ = [
    "BOOTSTRAP",
    "MCNEMAR",
    "BootstrapInterval",
    "drop_with_test",
    "mcnemar",
    "paired_bootstrap",
    "perplexity_ratio_with_test",
    "stratified_mcnemar",
]

MCNEMAR, BOOTSTRAP = "exact McNemar", "paired bootstrap"

_RESAMPLES = 4000
_MOST_INDICES = 2_000_000
_MOST_ENUMERATED = 2_000_000
_DRAWS = 1_000_000


@dataclass(frozen=True)
class BootstrapInterval(Interval):
    """A statistic with its BCa interval and a test of zero.

    Attributes:
        p_value: Two-sided: one minus the confidence level at which the interval just reaches zero; None if a task has
            a single document.
        standard_error: By the delta method; None likewise.
    """

    p_value: float | None = None
    standard_error: float | None = None


def mcnemar(losses: int, gains: int) -> float:
    """P-value of the two-sided exact McNemar test: under no difference, every disagreement is a fair coin toss.

    Args:
        losses: Documents that only the first model gets right.
        gains: Documents that only the second model gets right.

    Source: McNemar (1947), Psychometrika 12:153; the exact form conditions on the number of disagreements.
    """
    from scipy.stats import binomtest  # takes half a second to import, which reading a study does not need

    return float(binomtest(losses, losses + gains).pvalue) if losses + gains else 1.0


def stratified_mcnemar(losses: Sequence[int], gains: Sequence[int], shares: Sequence[float], *, seed: int = 0) -> float:
    """McNemar's test of a weighted mean over tasks: under no difference, every disagreement is a fair coin toss.

    The statistic is the sum of share x (losses - gains). Tasks whose documents have equal shares are pooled. If the
    remaining tasks allow too many outcomes to enumerate, a million are drawn by seed.

    Args:
        losses: As in `mcnemar`, per task.
        gains: Likewise.
        shares: Share of one document in the mean, per task.
        seed: Seed of the draws.
    """
    pooled: dict[float, list[int]] = {}
    for lost, gained, share in zip(losses, gains, shares, strict=True):
        near = next((known for known in pooled if math.isclose(known, share, rel_tol=1e-9)), share)
        entry = pooled.setdefault(near, [0, 0])
        entry[0], entry[1] = entry[0] + lost, entry[1] + gained
    strata = {share: (lost, gained) for share, (lost, gained) in pooled.items() if lost + gained}
    if len(strata) <= 1:
        return mcnemar(*next(iter(strata.values()), (0, 0)))
    observed = abs(sum(share * (lost - gained) for share, (lost, gained) in strata.items()))
    edge = observed * (1 - 1e-9)
    sizes = [lost + gained for lost, gained in strata.values()]
    if math.prod(size + 1 for size in sizes) <= _MOST_ENUMERATED:
        statistic, weight = np.zeros(1), np.ones(1)
        for share, size in zip(strata, sizes, strict=True):
            heads = np.arange(size + 1)
            chances = np.array([math.comb(size, k) / (1 << size) for k in range(size + 1)])
            statistic = np.add.outer(statistic, share * (2 * heads - size)).ravel()
            weight = np.multiply.outer(weight, chances).ravel()
        return min(1.0, float(weight[np.abs(statistic) >= edge].sum()))
    generator = np.random.default_rng(seed)
    drawn = sum(
        share * (2.0 * generator.binomial(size, 0.5, _DRAWS) - size) for share, size in zip(strata, sizes, strict=True)
    )
    return (1 + int((np.abs(drawn) >= edge).sum())) / (1 + _DRAWS)


def paired_bootstrap(
    values: Sequence[Outcomes],
    units: Sequence[Outcomes] | None = None,
    weights: Weights = None,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> BootstrapInterval:
    """Weighted mean over tasks of sum(values) / sum(units); documents are resampled within each task.

    Args:
        values: One array (documents,) per task: differences between two models on the same document.
        units: The units that each difference is divided by, such as words; 1 per document by default.
        weights: As in `mean_interval`; so is `confidence`.
        resamples: Number of resamples, drawn by `seed`.

    Source: Efron (1987), Journal of the American Statistical Association 82:171 (BCa); the acceleration of several
    samples from empirical influence values as in Davison and Hinkley (1997), chapter 5; the levels of small samples
    from Hesterberg (2015), The American Statistician 69:371.
    """
    shares = task_shares(len(values), weights)
    divisors = [np.ones_like(array) for array in values] if units is None else list(units)
    ratios = [float(array.sum() / unit.sum()) for array, unit in zip(values, divisors, strict=True)]
    estimate = float(sum(share * ratio for share, ratio in zip(shares, ratios, strict=True)))
    documents = sum(array.size for array in values)
    if any(array.size < 2 for array in values):
        return BootstrapInterval(estimate, documents=documents)
    influence = [
        share * (array - ratio * unit) / unit.sum()
        for share, array, unit, ratio in zip(shares, values, divisors, ratios, strict=True)
    ]
    squares = sum(float(part @ part) for part in influence)
    variance = sum(part.size / (part.size - 1) * float(part @ part) for part in influence)
    if squares == 0.0:
        return BootstrapInterval(estimate, estimate, estimate, documents, 1.0 if estimate == 0 else 0.0, 0.0)
    acceleration = sum(float((part**3).sum()) for part in influence) / (6 * squares**1.5)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for share, array, unit in zip(shares, values, divisors, strict=True):
        drawn += share * _resampled(array, unit, resamples, generator)
    bias = normal_quantile(_share_below(drawn, estimate))
    # The variance of a resample is (n - 1) / n of the sample's, and the sample's is itself an estimate.
    degrees = sum(array.size - 1 for array in values)
    widening = math.sqrt((degrees + 1) / degrees)
    tail = widening * float(special.stdtrit(degrees, (1 + confidence) / 2))
    low, high = (float(np.quantile(drawn, _bca_level(z, bias, acceleration))) for z in (-tail, tail))
    z = _unshifted(normal_quantile(_share_below(drawn, 0.0)), bias, acceleration)
    p_value = max(2 * float(special.stdtr(degrees, -abs(z) / widening)), 1.0 / resamples)
    return BootstrapInterval(estimate, low, high, documents, min(1.0, p_value), math.sqrt(variance))


def drop_with_test(
    baseline: Sequence[Outcomes], candidate: Sequence[Outcomes], weights: Weights = None, confidence: float = 0.95
) -> PairedDrop:
    """Drop of the weighted mean from baseline to candidate with its test: McNemar for 0/1 outcomes, else bootstrap.

    The arguments are those of `paired_drop`. With McNemar the interval is its interval, too. Test and interval are
    different procedures and may disagree if the p-value is close to one minus the confidence level.

    Raises:
        TaskError: The arrays do not have the same shapes, or have no document in common.
    """
    pairs = paired_outcomes(baseline, candidate)
    differences = [before - after for before, after in pairs]
    if not all(is_binary(before) and is_binary(after) for before, after in pairs):
        found = paired_bootstrap(differences, None, weights, confidence=confidence)
        detectable = smallest_detectable_change(found.standard_error)
        return PairedDrop(found.value, found.low, found.high, found.documents, found.p_value, detectable, BOOTSTRAP)
    losses, gains = ([int((sign * array > 0).sum()) for array in differences] for sign in (1, -1))
    shares = [
        float(share) / array.size for share, array in zip(task_shares(len(pairs), weights), differences, strict=True)
    ]
    return dataclasses.replace(
        paired_drop(baseline, candidate, weights, confidence),
        p_value=stratified_mcnemar(losses, gains, shares),
        smallest_detectable=_detectable(losses, gains, shares, [array.size for array in differences]),
        test=MCNEMAR,
        losses=sum(losses),
        gains=sum(gains),
    )


def perplexity_ratio_with_test(
    baseline: Sequence[Outcomes], candidate: Sequence[Outcomes], weights: Weights = None, confidence: float = 0.95
) -> PairedRatio:
    """Perplexity of the candidate over the baseline's with the paired bootstrap, computed on the logarithm.

    The arguments are those of `paired_perplexity_ratio`.

    Raises:
        TaskError: The arrays do not have the same shapes, their word counts differ, or they have no document in common.
    """
    pairs = paired_losses(baseline, candidate)
    found = paired_bootstrap([loss for loss, _ in pairs], [words for _, words in pairs], weights, confidence=confidence)
    detectable = smallest_detectable_change(found.standard_error)
    return PairedRatio(
        **vars(exponential(found)),
        p_value=found.p_value,
        smallest_detectable=None if detectable is None else math.exp(detectable),
        test=BOOTSTRAP,
    )


def _detectable(
    losses: Sequence[int], gains: Sequence[int], shares: Sequence[float], sizes: Sequence[int]
) -> float | None:
    """Exact if all documents have equal shares; else from the standard error of the mean at the observed rates."""
    if all(math.isclose(share, shares[0], rel_tol=1e-9) for share in shares):
        return smallest_detectable_drop(sum(losses) + sum(gains), sum(sizes))
    variance = sum(share**2 * (lost + gained + 2) for share, lost, gained in zip(shares, losses, gains, strict=True))
    return smallest_detectable_change(math.sqrt(variance))


def _resampled(values: Outcomes, units: Outcomes, resamples: int, generator: np.random.Generator) -> Outcomes:
    """sum(values) / sum(units) of documents drawn with replacement, shape (resamples,)."""
    documents = values.size
    rows = max(1, _MOST_INDICES // documents)
    is_constant = bool((units == units[0]).all())
    parts = []
    for begin in range(0, resamples, rows):
        drawn = generator.integers(0, documents, (min(rows, resamples - begin), documents))
        total = documents * units[0] if is_constant else units[drawn].sum(axis=1)
        parts.append(values[drawn].sum(axis=1) / total)
    return np.concatenate(parts)


def _share_below(drawn: Outcomes, value: float) -> float:
    """Share of the resamples below a value; ties count half; kept off 0 and 1, which have no finite normal quantile."""
    share = float((drawn < value).mean() + (drawn == value).mean() / 2)
    return min(max(share, 0.5 / drawn.size), 1 - 0.5 / drawn.size)


def _bca_level(z: float, bias: float, acceleration: float) -> float:
    """The quantile level of the resamples that BCa uses for the normal quantile z."""
    shifted = bias + z
    return float(special.ndtr(bias + shifted / max(1e-3, 1 - acceleration * shifted)))


def _unshifted(zero: float, bias: float, acceleration: float) -> float:
    """Inverse of `_bca_level`: the normal quantile whose BCa level is a given quantile of the resamples."""
    shift = zero - bias
    return shift / max(1e-3, 1 + acceleration * shift) - bias
