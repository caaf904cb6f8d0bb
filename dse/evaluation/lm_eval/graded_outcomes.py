"""Graded metrics of lm-eval tasks, computed from the answers in their requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask
from numpy.typing import NDArray
from scipy import special

from dse.evaluation.graded_metrics import (
    CHOICE_PROBABILITY,
    GRADED_METRICS,
    TARGET_LOG_LIKELIHOOD,
    GradedMetric,
    choice_probability,
)
from dse.evaluation.lm_eval.task_loading import LeafTask

__all__ = ["graded_names", "graded_outcomes"]


def graded_names(leaves: Sequence[LeafTask]) -> tuple[GradedMetric, ...]:
    """The graded metrics that a task, or every member of a group, has.

    Multiple choice has both, including the form with several contexts and one continuation (WinoGrande). A cloze task
    has the log-likelihood of its target. Whole-text perplexities, generation, and multiple choice without a known
    right answer have neither.
    """
    served = [_served(leaf) for leaf in leaves]
    return tuple(name for name in GRADED_METRICS if all(name in names for names in served))


def graded_outcomes(leaves: Sequence[LeafTask]) -> dict[str, NDArray[np.float64]]:
    """Per-document outcomes of the graded metrics, shape (documents,); NaN for a document without a right answer."""
    names = graded_names(leaves)
    if not names:
        return {}
    documents = [
        # Repetitions have the same answer, and filters apply to generated text only.
        _document_outcomes(leaf.task, row, [float(request.resps[0][0]) for request in requests])
        for leaf in leaves
        for row, requests in zip(leaf.rows, leaf.requests(), strict=True)
    ]
    return {name: np.asarray([found.get(name, math.nan) for found in documents], dtype=np.float64) for name in names}


def _served(leaf: LeafTask) -> tuple[GradedMetric, ...]:
    if not isinstance(leaf.task, ConfigurableTask):
        return ()
    if leaf.task.OUTPUT_TYPE == "loglikelihood":
        return (TARGET_LOG_LIKELIHOOD,)
    if leaf.task.OUTPUT_TYPE == "multiple_choice" and any(_right_choices(leaf.task, row) for row in leaf.rows):
        return GRADED_METRICS
    return ()


def _document_outcomes(task: Any, row: Any, likelihoods: list[float]) -> dict[str, float]:
    if task.OUTPUT_TYPE == "loglikelihood":
        return {TARGET_LOG_LIKELIHOOD: likelihoods[0]}
    right = _right_choices(task, row)
    if not right:
        return {}
    # With `acc_mutual_info`, the requests of the choices without context follow those of the choices.
    choices = np.asarray(likelihoods[: len(task.doc_to_choice(row))])
    return {
        CHOICE_PROBABILITY: choice_probability(likelihoods[: choices.size], right),
        TARGET_LOG_LIKELIHOOD: float(special.logsumexp(choices[right])),
    }


def _right_choices(task: Any, row: Any) -> list[int]:
    """Indices of the right choices; empty if the task names none, or one that does not exist."""
    target = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    choices = task.doc_to_choice(row)
    found = []
    for entry in target if isinstance(target, list) else [target]:
        index = choices.index(entry) if isinstance(entry, str) and entry in choices else entry
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
            return []
        found.append(index)
    return sorted(set(found))
