"""Comparison of two evaluations of the same documents: every task and every mean, with paired test and interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dse.errors import TaskError
from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.evaluation.result import EvaluationResult, TaskResult
from dse.evaluation.statistics.intervals import PairedDrop, PairedRatio, standard_error
from dse.evaluation.statistics.paired_tests import drop_with_test

__all__ = ["HELD_OUT_TEXT", "MEAN", "Comparison", "compare_divergences", "compare_evaluations"]

MEAN = "mean over tasks"
HELD_OUT_TEXT = "held-out text"


@dataclass(frozen=True)
class Comparison:
    """One quantity of two evaluations.

    Attributes:
        task: Name of the task, or `MEAN`, or `HELD_OUT_TEXT`.
        metric: Name of the metric.
        first: Value in the first evaluation.
        second: Value in the second evaluation.
        first_stderr: Unpaired standard error as lm-eval reports it; None for means over tasks.
        second_stderr: The same for the second evaluation.
        scale: Whether `change` is second - first, or second / first (perplexities).
        change: The difference or ratio; None if the two cannot be compared document by document.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        p_value: Two-sided p-value of "no difference"; None without a test.
        test: Name of the test; "" without one.
        detectable: Smallest change that this many documents detect with 80 % power, as a difference or a ratio above 1.
        documents: Number of documents compared.
        losses: Documents that only the first gets right; None for graded outcomes.
        gains: Documents that only the second gets right.
    """

    task: str
    metric: str
    first: float
    second: float
    first_stderr: float | None
    second_stderr: float | None
    scale: Literal["difference", "ratio"] = "difference"
    change: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    test: str = ""
    detectable: float | None = None
    documents: int = 0
    losses: int | None = None
    gains: int | None = None


def compare_evaluations(first: EvaluationResult, second: EvaluationResult) -> tuple[Comparison, ...]:
    """Compare every task by its main and graded metrics, then the means over all tasks of a kind.

    Args:
        first: The reference of the changes.
        second: An evaluation of the same documents.

    Raises:
        TaskError: The two evaluations differ in tasks, metrics or documents.
    """
    names = [[(task.task, task.metric) for task in result.tasks] for result in (first, second)]
    if names[0] != names[1]:
        raise TaskError(f"trials can be compared only on the same tasks, but got {names[0]} and {names[1]}")
    rows = [
        row
        for before, after in zip(first.tasks, second.tasks, strict=True)
        for row in (_of_metric(before, after), *_of_graded(before, after))
    ]
    return (*rows, *_means(first, second))


def compare_divergences(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare the KL divergences of two points from the dense model, on the same windows of text.

    Args:
        first: Mean of each window, nats per token, shape (windows,): the reference of the change.
        second: The same for the other point.

    Raises:
        TaskError: The two have different numbers of windows.
    """
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    paired = drop_with_test([before], [after])
    means, errors = (float(before.mean()), float(after.mean())), (standard_error(before), standard_error(after))
    return _row(HELD_OUT_TEXT, "kl_divergence", means, errors, paired)


def _of_metric(before: TaskResult, after: TaskResult) -> Comparison:
    alone = [EvaluationResult((task,), 0.0) for task in (before, after)]
    paired: PairedDrop | PairedRatio | None = None
    if before.kind == after.kind == "perplexity":
        paired = alone[1].perplexity_ratio(alone[0])
    elif before.kind == after.kind == "accuracy":
        paired = alone[1].accuracy_drop(alone[0])
    elif _is_mean(before) and _is_mean(after):
        paired = drop_with_test([before.outcomes], [after.outcomes])
    return _row(before.task, before.metric, (before.value, after.value), (before.stderr, after.stderr), paired)


def _of_graded(before: TaskResult, after: TaskResult) -> Iterator[Comparison]:
    for name in GRADED_METRICS:
        pair = [task.graded[name] for task in (before, after) if name in task.graded]
        present = [outcomes[~np.isnan(outcomes)] for outcomes in pair]
        if len(pair) == 2 and all(outcomes.size for outcomes in present):
            first, second = present
            means, errors = (float(first.mean()), float(second.mean())), (standard_error(first), standard_error(second))
            yield _row(before.task, name, means, errors, drop_with_test([pair[0]], [pair[1]]))


def _means(first: EvaluationResult, second: EvaluationResult) -> Iterator[Comparison]:
    """Means of the metrics that more than one task has; with a single task the mean equals its own row."""
    pairs: tuple[tuple[str, float | None, float | None, PairedDrop | PairedRatio | None], ...] = (
        ("accuracy", first.accuracy, second.accuracy, second.accuracy_drop(first)),
        ("perplexity", first.perplexity, second.perplexity, second.perplexity_ratio(first)),
    )
    for kind, before, after, paired in pairs:
        if sum(task.kind == kind for task in first.tasks) > 1 and before is not None and after is not None:
            yield _row(MEAN, kind, (before, after), (None, None), paired)
    for name in first.graded_metrics:
        if sum(name in task.graded for task in first.tasks) > 1:
            intervals = first.graded_interval(name), second.graded_interval(name)
            if intervals[0] is not None and intervals[1] is not None:
                values = intervals[0].value, intervals[1].value
                yield _row(MEAN, name, values, (None, None), second.graded_drop(name, first))


def _row(
    task: str,
    metric: str,
    values: tuple[float, float],
    errors: tuple[float | None, float | None],
    paired: PairedDrop | PairedRatio | None,
) -> Comparison:
    """A comparison; the drop first - second of `paired` becomes the change second - first."""
    row = Comparison(task, metric, *values, *errors)
    if paired is None:
        return row
    change, low, high = paired.value, paired.low, paired.high
    if not isinstance(paired, PairedRatio):
        change, (low, high) = -change or 0.0, (None if end is None else -end for end in (high, low))
    return dataclasses.replace(
        row,
        scale="ratio" if isinstance(paired, PairedRatio) else "difference",
        change=change,
        low=low,
        high=high,
        p_value=paired.p_value,
        test=paired.test,
        detectable=paired.smallest_detectable,
        documents=paired.documents or 0,
        losses=paired.losses,
        gains=paired.gains,
    )


def _is_mean(task: TaskResult) -> bool:
    """Whether the metric is the mean of the outcomes, unlike a corpus metric such as BLEU."""
    if task.outcomes.ndim != 1 or task.outcomes.size == 0 or np.isnan(task.outcomes).all():
        return False
    return math.isclose(float(np.nanmean(task.outcomes)), task.value, rel_tol=1e-9, abs_tol=1e-12)
