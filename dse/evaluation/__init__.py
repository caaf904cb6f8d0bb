"""Model quality: lm-eval tasks and dataset tasks on a fixed set of documents, with confidence intervals.

Importing this package loads neither lm-eval nor torch, so reading results stays fast; the evaluators are imported on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dse.evaluation.answers import Answers, EvaluationCache
from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.evaluation.model_evaluator import ModelEvaluator, evaluator_for
from dse.evaluation.paired_comparison import Comparison, compare_divergences, compare_evaluations
from dse.evaluation.result import EvaluationResult, TaskResult, read_graded, read_outcomes
from dse.evaluation.statistics import (
    Interval,
    PairedDrop,
    PairedInterval,
    PairedRatio,
    mean_interval,
    paired_drop,
    paired_perplexity_ratio,
    perplexity_interval,
)
from dse.evaluation.task_spec import TaskSource, TaskSpec, builtin_tasks, resolve_task

if TYPE_CHECKING:
    from dse.evaluation.divergence import DenseDivergence, Divergence
    from dse.evaluation.heads import HeadEvaluator
    from dse.evaluation.lm_eval import Evaluator, SharedPrefixLM

__all__ = [
    "GRADED_METRICS",
    "Answers",
    "Comparison",
    "DenseDivergence",
    "Divergence",
    "EvaluationCache",
    "EvaluationResult",
    "Evaluator",
    "HeadEvaluator",
    "Interval",
    "ModelEvaluator",
    "PairedDrop",
    "PairedInterval",
    "PairedRatio",
    "SharedPrefixLM",
    "TaskResult",
    "TaskSource",
    "TaskSpec",
    "builtin_tasks",
    "compare_divergences",
    "compare_evaluations",
    "evaluator_for",
    "mean_interval",
    "paired_drop",
    "paired_perplexity_ratio",
    "perplexity_interval",
    "read_graded",
    "read_outcomes",
    "resolve_task",
]

_ON_FIRST_USE = {
    "DenseDivergence": "dse.evaluation.divergence",
    "Divergence": "dse.evaluation.divergence",
    "Evaluator": "dse.evaluation.lm_eval",
    "HeadEvaluator": "dse.evaluation.heads",
    "SharedPrefixLM": "dse.evaluation.lm_eval",
}


def __getattr__(name: str) -> Any:
    """Import the names that need torch or lm-eval on first use."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
