"""Intervals for accuracies, perplexities and their paired differences: arrays in, values out.

Outcomes are one array per task: shape (documents,) for a metric that is the mean over documents, shape (documents, 2)
holding (log-likelihood, words) for a perplexity. NaN marks a document without an outcome. Several tasks are combined
by weight with MOVER (Zou and Donner 2008, Statistics in Medicine 27:1693): variances of independent tasks add, each
recovered from the task's own, possibly lopsided, interval; for one task the result is that task's interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dse.errors import TaskError

__all__ = [
    "Interval",
    "Outcomes",
    "PairedDrop",
    "PairedInterval",
    "PairedRatio",
    "is_binary",
    "log_ratio_error",
    "mean_interval",
    "paired_drop",
    "paired_perplexity_ratio",
    "paired_present",
    "perplexity_interval",
    "shares_of",
    "student_quantile",
    "wilson",
]

Outcomes = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval.

    Attributes:
        value: The point estimate.
        low: Lower bound; None where the spread is unknown, as with a single document.
        high: Upper bound; None likewise.
        documents: Number of documents behind the value, over all tasks; None where documents play no part.
    """

    value: float
    low: float | None = None
    high: float | None = None
    documents: int | None = None


@dataclass(frozen=True)
class PairedInterval(Interval):
    """A difference or ratio over the same documents, with the result of a significance test.

    Attributes:
        p_value: Two-sided p-value of "no difference"; None without a test.
        smallest_detectable: Smallest difference (or increase, as a ratio) that this many documents detect with 80 %
            power at a 5 % level; None where even the largest possible one would go undetected.
        test: Name of the test; "" without one.
        losses: Documents that only the baseline gets right; None for graded outcomes.
        gains: Documents that only the candidate gets right; None for graded outcomes.
    """

    p_value: float | None = None
    smallest_detectable: float | None = None
    test: str = ""
    losses: int | None = None
    gains: int | None = None


@dataclass(frozen=True)
class PairedDrop(PairedInterval):
    """Baseline minus candidate on the same documents; positive means that the candidate is worse."""


@dataclass(frozen=True)
class PairedRatio(PairedInterval):
    """Candidate over baseline on the same documents; above 1 means that the candidate is worse."""


def mean_interval(
    outcomes: Sequence[Outcomes], weights: Sequence[float] | None = None, confidence: float = 0.95
) -> Interval:
    """Weighted mean over tasks of the mean outcome: Wilson for 0/1 outcomes, Student's t for graded ones.

    Args:
        outcomes: One array (documents,) per task.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.

    Source: Wilson (1927); Zou and Donner (2008).
    """
    values = [_present(array) for array in outcomes]
    parts = [
        wilson(float(array.sum()), array.size, confidence) if is_binary(array) else _student_mean(array, confidence)
        for array in values
    ]
    return Interval(*_combine(parts, weights), documents=sum(array.size for array in values))


def paired_drop(
    dense: Sequence[Outcomes],
    point: Sequence[Outcomes],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> PairedDrop:
    """Drop of the weighted mean from dense to point, paired by document.

    For 0/1 outcomes the interval is Bonett and Price's adjusted Wald interval, which has a width even where no
    document changed; for graded outcomes it is Student's t on the differences.

    Args:
        dense: One array (documents,) per task.
        point: Arrays of the same shapes: the same documents in the same order.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.

    Raises:
        TaskError: The arrays do not have the same shapes.

    Source: Bonett and Price (2012), Journal of Educational and Behavioral Statistics 37:479.
    """
    parts, documents = [], 0
    for before, after in paired_present(dense, point):
        difference = before - after
        documents += difference.size
        if (is_binary(before) and is_binary(after)) or (difference.size > 1 and not difference.any()):
            parts.append(
                _bonett_price(int((difference > 0).sum()), int((difference < 0).sum()), difference.size, confidence)
            )
        else:
            parts.append(_student_mean(difference, confidence))
    return PairedDrop(*_combine(parts, weights), documents=documents)


def perplexity_interval(
    outcomes: Sequence[Outcomes], weights: Sequence[float] | None = None, confidence: float = 0.95
) -> Interval:
    """Weighted geometric mean over tasks of exp(-sum of log-likelihoods / sum of words).

    The interval is symmetric in the logarithm (delta method for a ratio of sums over documents, Student's t).

    Args:
        outcomes: One array (documents, 2) per task: log-likelihood (nats), words.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.

    Source: Cochran (1977), Sampling Techniques, chapter 6 (ratio estimators).
    """
    values = [_present(array) for array in outcomes]
    parts = [_log_ratio(array[:, 0], array[:, 1], confidence) for array in values]
    estimate, low, high = _combine(parts, weights)
    return Interval(math.exp(estimate), _exp(low), _exp(high), documents=sum(array.shape[0] for array in values))


def paired_perplexity_ratio(
    dense: Sequence[Outcomes],
    point: Sequence[Outcomes],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> PairedRatio:
    """Perplexity of point over dense, paired by document; geometric mean over tasks by weight.

    The logarithm of the ratio is a ratio of sums over documents (loss added, words), so the delta method gives its
    spread; what both models find hard cancels.

    Args:
        dense: One array (documents, 2) per task: log-likelihood (nats), words.
        point: Arrays of the same shapes: the same documents in the same order.
        weights: One positive weight per task; equal by default.
        confidence: Of the interval.

    Raises:
        TaskError: The arrays do not have the same shapes, or differ in their words.
    """
    parts, documents = [], 0
    for before, after in paired_present(dense, point):
        if not np.array_equal(before[:, 1], after[:, 1]):
            raise TaskError("paired outcomes must count the same words, but they differ; evaluate the same documents")
        documents += before.shape[0]
        parts.append(_log_ratio(after[:, 0] - before[:, 0], before[:, 1], confidence))
    estimate, low, high = _combine(parts, weights)
    return PairedRatio(math.exp(estimate), _exp(low), _exp(high), documents=documents)


def wilson(successes: float, documents: int, confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Proportion with Wilson's score interval: (estimate, low, high).

    Source: Wilson (1927), Journal of the American Statistical Association 22:209.
    """
    z = _normal_quantile(confidence)
    share, scale = successes / documents, 1 + z * z / documents
    centre = (share + z * z / (2 * documents)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / documents + z * z / (4 * documents**2))
    return share, max(0.0, centre - half), min(1.0, centre + half)


def log_ratio_error(log_likelihoods: Outcomes, words: Outcomes) -> float:
    """Standard error of sum(log_likelihoods) / sum(words) over documents (delta method), for at least two.

    Args:
        log_likelihoods: Shape (documents,), nats.
        words: Shape (documents,), what the log-likelihoods are divided by.
    """
    documents, total = log_likelihoods.size, float(words.sum())
    residual = log_likelihoods - float(log_likelihoods.sum()) / total * words
    return math.sqrt(documents / (documents - 1) * float(residual @ residual)) / total


@functools.lru_cache(maxsize=256)
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for 0.5 <= probability < 1, exact to about 1e-9.

    With x = sqrt(degrees) tan(angle), the density becomes proportional to cos(angle)^(degrees - 1) on a bounded
    interval; Gauss-Legendre integrates it and bisection inverts it.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(96)
    norm = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        # Past this width the density is below 1e-16 of its peak, so the nodes are spent where it is not.
        reach = min(angle, 9.0 / math.sqrt(degrees))
        grid = reach / 2 * (nodes + 1)
        below = 0.5 + norm * reach / 2 * float(node_weights @ np.cos(grid) ** (degrees - 1))
        low, high = (angle, high) if below < probability else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _bonett_price(
    losses: int, gains: int, documents: int, confidence: float
) -> tuple[float, float | None, float | None]:
    """Difference of paired proportions: one pseudo-document is added to each kind of disagreement."""
    z = _normal_quantile(confidence)
    lost, gained = (losses + 1) / (documents + 2), (gains + 1) / (documents + 2)
    centre = lost - gained
    half = z * math.sqrt((lost + gained - centre * centre) / (documents + 2))
    return (losses - gains) / documents, max(-1.0, centre - half), min(1.0, centre + half)


def _student_mean(values: Outcomes, confidence: float) -> tuple[float, float | None, float | None]:
    mean = float(values.mean())
    if values.size < 2:
        return mean, None, None
    half = student_quantile((1 + confidence) / 2, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean, mean - half, mean + half


def _log_ratio(gain: Outcomes, words: Outcomes, confidence: float) -> tuple[float, float | None, float | None]:
    """-sum(gain) / sum(words) with the delta-method interval of a ratio estimator."""
    ratio = -float(gain.sum()) / float(words.sum())
    if gain.size < 2:
        return ratio, None, None
    half = student_quantile((1 + confidence) / 2, gain.size - 1) * log_ratio_error(gain, words)
    return ratio, ratio - half, ratio + half


def _combine(
    parts: Sequence[tuple[float, float | None, float | None]], weights: Sequence[float] | None
) -> tuple[float, float | None, float | None]:
    """Weighted mean of independent estimates with the MOVER interval."""
    shares = shares_of(len(parts), weights)
    estimate = float(sum(share * part[0] for share, part in zip(shares, parts, strict=True)))
    below = above = 0.0
    for share, (value, low, high) in zip(shares, parts, strict=True):
        if low is None or high is None:
            return estimate, None, None
        below += float(share * (value - low)) ** 2
        above += float(share * (high - value)) ** 2
    return estimate, estimate - math.sqrt(below), estimate + math.sqrt(above)


def shares_of(tasks: int, weights: Sequence[float] | None) -> Outcomes:
    """Shares of the tasks in a mean, shape (tasks,), summing to 1.

    Raises:
        TaskError: There is no task, or not one positive weight for each.
    """
    shares: Outcomes = np.asarray([1.0] * tasks if weights is None else weights, dtype=np.float64)
    if tasks == 0 or shares.shape != (tasks,) or not (shares > 0).all():
        raise TaskError(f"one positive weight must stand for each of the {tasks} tasks, but got {weights}")
    shares = shares / shares.sum()
    return shares


def paired_present(dense: Sequence[Outcomes], point: Sequence[Outcomes]) -> list[tuple[Outcomes, Outcomes]]:
    """Both outcomes of every task, without the documents that lack one of them.

    Raises:
        TaskError: The shapes differ, or a task has no document with both.
    """
    shapes = [array.shape for array in dense], [array.shape for array in point]
    if shapes[0] != shapes[1]:
        raise TaskError(
            f"paired outcomes must be of the same documents, but their shapes are {shapes[0]} and {shapes[1]}"
        )
    pairs = []
    for before, after in zip(dense, point, strict=True):
        missing = np.isnan(before) | np.isnan(after)
        present = ~(missing if missing.ndim == 1 else missing.any(axis=1))
        if not present.any():
            raise TaskError("a paired difference must have at least one document with both outcomes, but has none")
        pairs.append((before[present], after[present]))
    return pairs


def _present(array: Outcomes) -> Outcomes:
    """Without the documents that have no outcome."""
    missing = np.isnan(array) if array.ndim == 1 else np.isnan(array).any(axis=1)
    if missing.all():
        raise TaskError("a mean must have at least one document with an outcome, but there is none")
    return array[~missing]


def is_binary(array: Outcomes) -> bool:
    """Whether all outcomes are 0 or 1."""
    return bool(np.isin(array, (0.0, 1.0)).all())


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)
