"""Trials that reached the top rung: what those below are judged against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.evaluation import EvaluationResult, TaskResult
from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.pareto import Objective
from dse.trial_record import TrialRecord

__all__ = ["Established", "outcomes_of", "restricted", "value_of"]


@dataclass(frozen=True)
class Established:
    """A trial that reached the top rung.

    Attributes:
        record: Complete, with every objective.
        evaluation: On all documents; None where the study has no tasks.
    """

    record: TrialRecord
    evaluation: EvaluationResult | None


def restricted(result: EvaluationResult, masks: Mapping[str, NDArray[np.bool_]]) -> EvaluationResult:
    """Only some documents of a result, for paired comparisons; its own values and standard errors are left out."""
    tasks = tuple(
        dataclasses.replace(
            task,
            value=math.nan,
            stderr=None,
            documents=int(masks[task.task].sum()),
            outcomes=task.outcomes[masks[task.task]],
            graded={name: outcomes[masks[task.task]] for name, outcomes in task.graded.items()},
            all_metrics={},
        )
        for task in result.tasks
    )
    return EvaluationResult(tasks, result.seconds)


def outcomes_of(objective: Objective, task: TaskResult) -> NDArray[np.float64] | None:
    """Of each document, where the task says something of the objective."""
    if objective.name in GRADED_METRICS:
        return task.graded.get(objective.name)
    return task.outcomes if task.kind == objective.name else None


def value_of(objective: Objective, record: TrialRecord) -> float:
    """Measured, or exact by arithmetic; NaN where neither."""
    measured = record.quantities.get(objective.name)
    value = record.cost.get(objective.name) if measured is None else measured.value
    return math.nan if value is None else float(value)
