"""From an evaluation to what a trial's record says of it: values, drops against dense, and lm-eval's own figures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dse.evaluation import EvaluationResult, PairedInterval, TaskResult
from dse.evaluation import Interval as Estimate
from dse.trial_record import Interval, PairedChange, TrialRecord

__all__ = ["with_evaluation"]


def with_evaluation(record: TrialRecord, result: EvaluationResult, dense: EvaluationResult | None) -> TrialRecord:
    """The record with accuracy, perplexity and graded metrics, each with its interval, and their paired drops.

    Args:
        record: So far.
        result: Of this trial.
        dense: Of the dense model over the same documents; None while it is itself being measured.
    """
    quantities, ratios, drops = dict(record.quantities), dict(record.ratios), dict(record.graded_drops)
    accuracy_drop: Interval | None = None
    if (accuracy := result.accuracy_interval()) is not None:
        quantities["accuracy"] = _plain(accuracy)
        accuracy_drop = Interval(0.0, 0.0, 0.0) if dense is None else _change(result.accuracy_drop(dense))
    if (perplexity := result.perplexity_interval()) is not None:
        quantities["perplexity"] = _plain(perplexity)
        if dense is not None and (ratio := _change(result.perplexity_ratio(dense))) is not None:
            ratios["perplexity"] = ratio
    for name in result.graded_metrics:
        if (found := result.graded_interval(name)) is not None:
            quantities[name] = _plain(found)
            drop = Interval(0.0, 0.0, 0.0) if dense is None else _change(result.graded_drop(name, dense))
            if drop is not None:
                drops[name] = drop
    return dataclasses.replace(
        record,
        quantities=quantities,
        ratios=ratios,
        accuracy_drop=accuracy_drop,
        graded_drops=drops,
        tasks={task.task: _task_entry(task) for task in result.tasks},
    )


def _task_entry(task: TaskResult) -> dict[str, Any]:
    metrics = {name: [_finite(value), _finite(error)] for name, (value, error) in task.all_metrics.items()}
    for name, outcomes in task.graded.items():
        present = outcomes[~np.isnan(outcomes)]
        if present.size:
            error = float(present.std(ddof=1)) / math.sqrt(present.size) if present.size > 1 else None
            metrics[name] = [float(present.mean()), error]
    return {"metric": task.metric, "documents": task.documents, "metrics": metrics}


def _plain(estimate: Estimate) -> Interval:
    return Interval(_finite(estimate.estimate), _finite(estimate.low), _finite(estimate.high))


def _change(paired: PairedInterval | None) -> PairedChange | None:
    if paired is None:
        return None
    return PairedChange(
        value=_finite(paired.estimate),
        low=_finite(paired.low),
        high=_finite(paired.high),
        documents=paired.documents,
        p_value=_finite(paired.p_value),
        detectable=_finite(paired.smallest_detectable),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
