"""Which evaluator serves a model: lm-eval's tasks for language models, data sets for every other head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dse.config import DatasetTaskConfig, EvaluationConfig, TaskConfig
from dse.errors import ConfigError
from dse.evaluation.answers import Answers
from dse.evaluation.result import EvaluationResult
from dse.evaluation.task_spec import TaskSpec
from dse.models import LoadedModel

__all__ = ["ModelEvaluator", "evaluator_for"]


class ModelEvaluator(Protocol):
    """A fixed set of tasks and documents, for a model that changes between calls."""

    fingerprint: str

    @property
    def documents(self) -> dict[str, list[int]]:
        """Indices of the documents evaluated, ascending, by task."""

    @property
    def metrics(self) -> dict[str, str]:
        """The metric that stands for each task."""

    @property
    def graded(self) -> dict[str, tuple[str, ...]]:
        """The graded metrics of each task."""

    def identity(self, point_id: str, factors: str) -> Mapping[str, str]:
        """What an answer depends on beside the document."""

    def evaluate(
        self, progress: Callable[[int, int], None] | None = None, *, share: float = 1.0, answers: Answers | None = None
    ) -> EvaluationResult:
        """Evaluate the model as it is now."""

    def within_share(self, share: float) -> Mapping[str, NDArray[np.bool_]]:
        """Which of each task's outcomes belong to the documents of a share."""

    def digests(self, share: float = 1.0) -> list[str]:
        """Of the documents of a share, as `Answers` know them."""


def evaluator_for(
    loaded: LoadedModel,
    tasks: Sequence[TaskConfig | DatasetTaskConfig],
    settings: EvaluationConfig,
    *,
    fresh: int = 0,
) -> ModelEvaluator:
    """Load the tasks and find every defect they have; make it while the model is dense.

    Args:
        loaded: The model.
        tasks: All of one kind: lm-eval's, or on data sets.
        settings: How they are run.
        fresh: Documents for each task beyond those of its limit, in their place; 0 takes those of the limit.

    Raises:
        TaskError: A task cannot be found, read or scored, or lacks the metric asked for.
        ConfigError: A setting does not go with the tasks.
        ModelError: The model does not have the head that the tasks need, or no chat template though one was asked for.
    """
    on_datasets = [task for task in tasks if isinstance(task, DatasetTaskConfig)]
    by_lm_eval = [task for task in tasks if isinstance(task, TaskConfig)]
    if not on_datasets:
        from dse.evaluation.lm_eval.lm_eval_evaluator import (
            Evaluator,  # seconds, which tasks on data sets need not wait for
        )

        return Evaluator(
            loaded,
            [TaskSpec(task.task, task.metric, task.weight, task.limit, task.num_fewshot) for task in by_lm_eval],
            limit=settings.limit,
            fresh=fresh,
            seed=settings.seed,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            apply_chat_template=settings.apply_chat_template,
            masked_scoring=settings.masked_scoring,
        )
    from dse.evaluation.heads.head_evaluator import HeadEvaluator

    if by_lm_eval:
        raise ConfigError("tasks must be all of lm-eval's kind or all on data sets, but got both; keep to one")
    if fresh:
        raise ConfigError("`fidelity.final_documents` is for lm-eval's tasks, but these are on data sets; leave it out")
    if settings.apply_chat_template:
        raise ConfigError("`apply_chat_template` is for lm-eval's tasks, but these are on data sets; set it to false")
    return HeadEvaluator(
        loaded,
        on_datasets,
        limit=settings.limit,
        seed=settings.seed,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
    )
