"""Model quality: lm-eval tasks and dataset tasks on a fixed set of documents, with confidence intervals.

Importing this package loads neither lm-eval nor torch, so reading results stays fast; the evaluators are imported on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dse.evaluation.answers import Answers as Answers
from dse.evaluation.answers import EvaluationCache as EvaluationCache
from dse.evaluation.graded_metrics import GRADED_METRICS as GRADED_METRICS
from dse.evaluation.model_evaluator import ModelEvaluator as ModelEvaluator
from dse.evaluation.model_evaluator import evaluator_for as evaluator_for
from dse.evaluation.paired_comparison import Comparison as Comparison
from dse.evaluation.paired_comparison import compare_divergences as compare_divergences
from dse.evaluation.paired_comparison import compare_evaluations as compare_evaluations
from dse.evaluation.result import EvaluationResult as EvaluationResult
from dse.evaluation.result import TaskResult as TaskResult
from dse.evaluation.result import read_graded as read_graded
from dse.evaluation.result import read_outcomes as read_outcomes
from dse.evaluation.statistics import Interval as Interval
from dse.evaluation.statistics import PairedDrop as PairedDrop
from dse.evaluation.statistics import PairedInterval as PairedInterval
from dse.evaluation.statistics import PairedRatio as PairedRatio
from dse.evaluation.statistics import mean_interval as mean_interval
from dse.evaluation.statistics import paired_drop as paired_drop
from dse.evaluation.statistics import paired_perplexity_ratio as paired_perplexity_ratio
from dse.evaluation.statistics import perplexity_interval as perplexity_interval
from dse.evaluation.task_spec import TaskSource as TaskSource
from dse.evaluation.task_spec import TaskSpec as TaskSpec
from dse.evaluation.task_spec import builtin_tasks as builtin_tasks
from dse.evaluation.task_spec import resolve_task as resolve_task

if TYPE_CHECKING:
    from dse.evaluation.divergence import DenseDivergence as DenseDivergence
    from dse.evaluation.divergence import Divergence as Divergence
    from dse.evaluation.heads import HeadEvaluator as HeadEvaluator
    from dse.evaluation.lm_eval import Evaluator as Evaluator
    from dse.evaluation.lm_eval import SharedPrefixLM as SharedPrefixLM

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
