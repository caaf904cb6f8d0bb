"""Turn the answers in a task's requests into metrics, standard errors and per-document outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import lm_eval.api.metrics as lm_eval_metrics
import numpy as np
from numpy.typing import NDArray

from dse.errors import NonFiniteError
from dse.evaluation.lm_eval.graded_outcomes import graded_outcomes
from dse.evaluation.lm_eval.task_loading import LeafTask, collect_outcomes
from dse.evaluation.result import TaskResult, kind_of
from dse.evaluation.statistics.intervals import log_ratio_error

__all__ = ["task_result"]

Aggregation = Callable[[Sequence[Any]], float]


def task_result(name: str, metric: str, weight: float, leaves: Sequence[LeafTask]) -> TaskResult:
    """Aggregate the answers of a task; the members of a group are weighted by their documents.

    Args:
        metric: Its main metric, one that all leaves report.
        weight: Weight of the task in means over tasks.
        leaves: Its lm-eval tasks, with answers in their requests.

    Raises:
        NonFiniteError: The metric is NaN or infinite.
    """
    collected = [collect_outcomes(leaf) for leaf in leaves]
    aggregations = leaves[0].task.aggregation()
    all_metrics: dict[str, tuple[float | None, float | None]] = {}
    for key in collected[0]:
        values = [value for outcomes in collected for value in outcomes.get(key, {}).values()]
        aggregate = _aggregation(key, aggregations)
        all_metrics[key] = _finite(_value(aggregate, values)), _finite(_standard_error(aggregate, values))
    value, stderr = all_metrics.get(metric, (None, None))
    if value is None:
        raise NonFiniteError(f"'{metric}' of task '{name}' must be a finite number, but is not; the trial is invalid")
    aggregate = _aggregation(metric, aggregations)
    found = [
        outcomes.get(metric, {}).get(position)
        for leaf, outcomes in zip(leaves, collected, strict=True)
        for position in range(len(leaf.rows))
    ]
    outcomes = _outcome_array(found, is_log_likelihood=aggregate is lm_eval_metrics.perplexity)
    is_higher_better = bool(leaves[0].task.higher_is_better().get(_bare(metric), True))
    return TaskResult(
        task=name,
        metric=metric,
        value=value,
        stderr=stderr,
        documents=len(found),
        higher_is_better=is_higher_better,
        outcomes=outcomes,
        all_metrics=all_metrics,
        weight=weight,
        kind=kind_of(metric, outcomes, is_mean=aggregate is lm_eval_metrics.mean, higher_is_better=is_higher_better),
        graded=graded_outcomes(leaves),
    )


def _outcome_array(found: Sequence[Any], *, is_log_likelihood: bool) -> NDArray[np.float64]:
    """Outcomes, shape (documents,), or (documents, 2) for pairs; NaN for absent and non-numeric ones."""
    present = [value for value in found if value is not None]
    if present and all(
        isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)) for value in present
    ):
        pairs = [(math.nan, math.nan) if value is None else value for value in found]
        return np.asarray(pairs, dtype=np.float64).reshape(len(found), 2)
    scalars = np.asarray([value if _is_number(value) else math.nan for value in found], dtype=np.float64)
    # A perplexity over continuations is exp(-mean log-likelihood), so every document is one unit.
    return np.stack([scalars, np.ones_like(scalars)], axis=1) if is_log_likelihood else scalars


def _standard_error(aggregate: Aggregation, values: Sequence[Any]) -> float | None:
    """Standard error: lm-eval's for means, the delta method for perplexities.

    lm-eval itself would bootstrap a perplexity with 100,000 resamples in forked processes at every call, or without
    bootstrap report no standard error at all.
    """
    if len(values) < 2:
        return None
    if aggregate is lm_eval_metrics.mean and all(map(_is_number, values)):
        return float(lm_eval_metrics.mean_stderr(values))
    if aggregate is lm_eval_metrics.perplexity:
        values = [(value, 1.0) for value in values]
    elif aggregate not in (lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte):
        return None
    pairs = np.asarray(values, dtype=np.float64)
    error = log_ratio_error(pairs[:, 0], pairs[:, 1])
    if aggregate is lm_eval_metrics.bits_per_byte:
        return error / math.log(2)
    return error * math.exp(-float(pairs[:, 0].sum() / pairs[:, 1].sum()))


def _value(aggregate: Aggregation, values: Sequence[Any]) -> float | None:
    try:
        return float(aggregate(values))
    except (OverflowError, ZeroDivisionError):  # a perplexity above 1e308, or texts without words
        return None


def _aggregation(key: str, aggregations: dict[str, Aggregation]) -> Aggregation:
    found: Aggregation = aggregations.get(_bare(key), lm_eval_metrics.mean)
    return found


def _bare(key: str) -> str:
    """The name of the metric without its filter."""
    return key.partition(",")[0]


def _is_number(value: object) -> bool:
    return isinstance(value, Real | np.number | np.bool_)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
