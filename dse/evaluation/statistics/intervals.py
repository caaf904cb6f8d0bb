"""Confidence intervals of accuracies, perplexities and their paired differences: arrays in, values out.

Outcomes are one array per task: shape (documents,) for a metric that is a mean over documents, shape (documents, 2)
with the columns (log-likelihood, words) for a perplexity. NaN marks a document without an outcome. Tasks are combined
by weight with MOVER (Zou and Donner 2008, Statistics in Medicine 27:1693): the variances of independent tasks add, and
each is recovered from the task's own interval, which may be asymmetric. For one task the result is its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dse.errors import TaskError

__all__ = [
    "Interval",
    "Outcomes",
    "PairedDrop",
    "PairedInterval",
    "PairedRatio",
    "mean_interval",
    "paired_drop",
    "paired_perplexity_ratio",
    "perplexity_interval",
    "wilson_interval",
]

Outcomes = NDArray[np.float64]
Weights = Sequence[float] | None


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval.

    Attributes:
        value: The point estimate.
        low: Lower bound; None if the spread is unknown, as with a single document.
        high: Upper bound; None likewise.
        documents: Number of documents behind the value, over all tasks; None if documents play no part.
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
            power at a 5 % level; None if even the largest possible one would go undetected.
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


def mean_interval(outcomes: Sequence[Outcomes], weights: Weights = None, confidence: float = 0.95) -> Interval:
    """Weighted mean over tasks of the mean outcome: Wilson's interval for 0/1 outcomes, Student's t for graded ones.

    Args:
        outcomes: One array (documents,) per task.
        weights: One positive weight per task; equal by default.
        confidence: Confidence level of the interval.

    Raises:
        TaskError: A task has no document with an outcome, or a weight is not positive.

    Source: Wilson (1927); Zou and Donner (2008).
    """
    values = [_present(array) for array in outcomes]
    parts = [
        wilson_interval(int(array.sum()), array.size, confidence)
        if is_binary(array)
        else student_interval(array, confidence)
        for array in values
    ]
    return _combine(parts, weights)


def paired_drop(
    baseline: Sequence[Outcomes], candidate: Sequence[Outcomes], weights: Weights = None, confidence: float = 0.95
) -> PairedDrop:
    """Drop of the weighted mean from baseline to candidate, paired by document.

    For 0/1 outcomes the interval is the adjusted Wald interval of Bonett and Price, which has a positive width even if
    no document changed. For graded outcomes it is Student's t on the differences.

    Args:
        baseline: One array (documents,) per task.
        candidate: Arrays of the same shapes, for the same documents in the same order.
        weights: As in `mean_interval`; so is `confidence`.

    Raises:
        TaskError: The arrays do not have the same shapes.

    Source: Bonett and Price (2012), Journal of Educational and Behavioral Statistics 37:479.
    """
    parts = []
    for before, after in paired_outcomes(baseline, candidate):
        difference = before - after
        if (is_binary(before) and is_binary(after)) or (difference.size > 1 and not difference.any()):
            losses, gains = int((difference > 0).sum()), int((difference < 0).sum())
            parts.append(_bonett_price(losses, gains, difference.size, confidence))
        else:
            parts.append(student_interval(difference, confidence))
    return PairedDrop(**vars(_combine(parts, weights)))


def perplexity_interval(outcomes: Sequence[Outcomes], weights: Weights = None, confidence: float = 0.95) -> Interval:
    """Weighted geometric mean over tasks of exp(-sum of log-likelihoods / sum of words).

    The interval is symmetric in the logarithm (delta method for a ratio of sums over documents, Student's t).

    Args:
        outcomes: One array (documents, 2) per task: log-likelihood (nats), words.
        weights: As in `mean_interval`; so is `confidence`.

    Raises:
        TaskError: A task has no document with an outcome, or a weight is not positive.

    Source: Cochran (1977), Sampling Techniques, chapter 6 (ratio estimators).
    """
    values = [_present(array) for array in outcomes]
    return exponential(_combine([_log_ratio(array[:, 0], array[:, 1], confidence) for array in values], weights))


def paired_perplexity_ratio(
    baseline: Sequence[Outcomes], candidate: Sequence[Outcomes], weights: Weights = None, confidence: float = 0.95
) -> PairedRatio:
    """Perplexity of the candidate over the baseline's, paired by document; weighted geometric mean over tasks.

    The logarithm of the ratio is a ratio of sums over documents (increase in loss, words), so the delta method gives
    its spread. What both models find hard cancels.

    The arguments are those of `paired_drop`, except for arrays of shape (documents, 2): log-likelihood (nats), words.

    Raises:
        TaskError: The arrays do not have the same shapes, or their word counts differ.
    """
    parts = [_log_ratio(-loss, words, confidence) for loss, words in paired_losses(baseline, candidate)]
    return PairedRatio(**vars(exponential(_combine(parts, weights))))


def wilson_interval(successes: int, documents: int, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval.

    Source: Wilson (1927), Journal of the American Statistical Association 22:209.
    """
    from scipy.stats import binomtest  # takes half a second to import, which reading a study does not need

    bounds = binomtest(successes, documents).proportion_ci(confidence, method="wilson")
    return Interval(successes / documents, float(bounds.low), float(bounds.high), documents)


def student_interval(values: Outcomes, confidence: float = 0.95) -> Interval:
    """The mean of `values`, shape (documents,), with Student's t interval; without bounds for a single document."""
    return _with_student_bounds(float(values.mean()), standard_error(values), values.size, confidence)


def standard_error(values: Outcomes) -> float | None:
    """Standard error of the mean of `values`, shape (documents,); None for a single document."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else None


def log_ratio_error(log_likelihoods: Outcomes, words: Outcomes) -> float:
    """Standard error of sum(log_likelihoods) / sum(words) over at least two documents (delta method).

    Args:
        log_likelihoods: Shape (documents,), nats.
        words: Shape (documents,), the units that the log-likelihoods are divided by.
    """
    documents, total = log_likelihoods.size, float(words.sum())
    residual = log_likelihoods - float(log_likelihoods.sum()) / total * words
    return math.sqrt(documents / (documents - 1) * float(residual @ residual)) / total


def normal_quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    return float(special.ndtri(probability))


def task_shares(tasks: int, weights: Weights) -> Outcomes:
    """The weights of the tasks in a mean, normalised to sum to 1, shape (tasks,).

    Raises:
        TaskError: There is no task, or not one positive weight for each.
    """
    shares: Outcomes = np.asarray([1.0] * tasks if weights is None else weights, dtype=np.float64)
    if tasks == 0 or shares.shape != (tasks,) or not (shares > 0).all():
        raise TaskError(f"each of the {tasks} tasks must have one positive weight, but got {weights}")
    shares = shares / shares.sum()
    return shares


def paired_outcomes(baseline: Sequence[Outcomes], candidate: Sequence[Outcomes]) -> list[tuple[Outcomes, Outcomes]]:
    """The outcomes of both models for each task, without the documents that lack one of them.

    Raises:
        TaskError: The shapes differ, or a task has no document with both outcomes.
    """
    shapes = [array.shape for array in baseline], [array.shape for array in candidate]
    if shapes[0] != shapes[1]:
        raise TaskError(
            f"paired outcomes must be of the same documents, but their shapes are {shapes[0]} and {shapes[1]}"
        )
    pairs = []
    for before, after in zip(baseline, candidate, strict=True):
        missing = np.isnan(before) | np.isnan(after)
        present = ~(missing if missing.ndim == 1 else missing.any(axis=1))
        if not present.any():
            raise TaskError("a paired difference needs at least one document with both outcomes, but there is none")
        pairs.append((before[present], after[present]))
    return pairs


def paired_losses(baseline: Sequence[Outcomes], candidate: Sequence[Outcomes]) -> list[tuple[Outcomes, Outcomes]]:
    """For each task, the increase in loss (nats) from baseline to candidate, and the words, of each common document.

    Raises:
        TaskError: As for `paired_outcomes`, or the word counts differ.
    """
    pairs = paired_outcomes(baseline, candidate)
    if not all(np.array_equal(before[:, 1], after[:, 1]) for before, after in pairs):
        raise TaskError("paired outcomes must count the same words, but the counts differ; evaluate the same documents")
    return [(before[:, 0] - after[:, 0], before[:, 1]) for before, after in pairs]


def exponential(interval: Interval) -> Interval:
    """The interval of exp(value)."""
    low, high = (None if bound is None else math.exp(bound) for bound in (interval.low, interval.high))
    return Interval(math.exp(interval.value), low, high, interval.documents)


def is_binary(array: Outcomes) -> bool:
    """Whether all outcomes are 0 or 1."""
    return bool(np.isin(array, (0.0, 1.0)).all())


def _bonett_price(losses: int, gains: int, documents: int, confidence: float) -> Interval:
    """Difference of paired proportions: one pseudo-document is added to each kind of disagreement."""
    lost, gained = (losses + 1) / (documents + 2), (gains + 1) / (documents + 2)
    centre = lost - gained
    half = normal_quantile((1 + confidence) / 2) * math.sqrt((lost + gained - centre * centre) / (documents + 2))
    return Interval((losses - gains) / documents, max(-1.0, centre - half), min(1.0, centre + half), documents)


def _log_ratio(gain: Outcomes, words: Outcomes, confidence: float) -> Interval:
    """-sum(gain) / sum(words) with the delta-method interval of a ratio estimator."""
    ratio = -float(gain.sum()) / float(words.sum())
    error = log_ratio_error(gain, words) if gain.size > 1 else None
    return _with_student_bounds(ratio, error, gain.size, confidence)


def _with_student_bounds(value: float, error: float | None, documents: int, confidence: float) -> Interval:
    if error is None:
        return Interval(value, documents=documents)
    # scipy.stats.t.ppf calls the same function after a slow import and 0.1 ms of argument checks.
    half = float(special.stdtrit(documents - 1, (1 + confidence) / 2)) * error
    return Interval(value, value - half, value + half, documents)


def _combine(parts: Sequence[Interval], weights: Weights) -> Interval:
    """Weighted mean of independent estimates with the MOVER interval."""
    shares = task_shares(len(parts), weights)
    value = float(sum(share * part.value for share, part in zip(shares, parts, strict=True)))
    documents = sum(part.documents or 0 for part in parts)
    below = above = 0.0
    for share, part in zip(shares, parts, strict=True):
        if part.low is None or part.high is None:
            return Interval(value, documents=documents)
        below += float(share * (part.value - part.low)) ** 2
        above += float(share * (part.high - part.value)) ** 2
    return Interval(value, value - math.sqrt(below), value + math.sqrt(above), documents)


def _present(array: Outcomes) -> Outcomes:
    """The outcomes without the documents that have none."""
    missing = np.isnan(array) if array.ndim == 1 else np.isnan(array).any(axis=1)
    if missing.all():
        raise TaskError("a mean needs at least one document with an outcome, but there is none")
    return array[~missing]
