"""How good a model is: lm-eval tasks on a fixed set of documents, and honest intervals for what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dse.evaluation.answers import Answers, EvaluationCache
from dse.evaluation.evaluators import ModelEvaluator, evaluator_for
from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.evaluation.result import EvaluationResult, TaskResult, read_graded, read_outcomes
from dse.evaluation.statistics.intervals import (
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
    from dse.evaluation.heads.head_evaluator import HeadEvaluator
    from dse.evaluation.lm_eval.lm_eval_evaluator import Evaluator
    from dse.evaluation.lm_eval.shared_prefix import SharedPrefixLM

__all__ = [
    "GRADED_METRICS",
    "Answers",
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
    "evaluator_for",
    "mean_interval",
    "paired_drop",
    "paired_perplexity_ratio",
    "perplexity_interval",
    "read_graded",
    "read_outcomes",
    "resolve_task",
]


def __getattr__(name: str) -> Any:
    """Import lm-eval (several seconds) only when an evaluator is asked for; reading results needs none of it."""
    if name == "Evaluator":
        from dse.evaluation.lm_eval.lm_eval_evaluator import Evaluator

        return Evaluator
    if name == "HeadEvaluator":
        from dse.evaluation.heads.head_evaluator import HeadEvaluator

        return HeadEvaluator
    if name == "SharedPrefixLM":
        from dse.evaluation.lm_eval.shared_prefix import SharedPrefixLM

        return SharedPrefixLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
