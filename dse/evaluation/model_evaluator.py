"""The interface of evaluators, and the choice of the evaluator that fits a study's tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dse.config import DatasetTaskConfig, EvaluationConfig, TaskConfig
from dse.errors import ConfigError
from dse.evaluation.answers import Answers
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.result import EvaluationResult
from dse.evaluation.task_spec import TaskSpec

if TYPE_CHECKING:
    from dse.models import LoadedModel

__all__ = ["ModelEvaluator", "evaluator_for"]


class ModelEvaluator(Protocol):
    """A fixed set of tasks and documents, for a model that changes between calls.

    Attributes:
        batch_size: Tokens in a batch; halved whenever the device runs out of memory, for all later batches.
    """

    batch_size: BatchSize

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of everything that scores depend on besides the model."""

    @property
    def documents(self) -> dict[str, list[int]]:
        """Task to the indices of its documents, ascending."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task to its main metric."""

    @property
    def graded(self) -> dict[str, tuple[str, ...]]:
        """Task to its graded metrics (see `dse.evaluation.graded_metrics`)."""

    def identity(self, point_id: str, factors: str) -> Mapping[str, str]:
        """Everything that an answer depends on besides the document; the key of `EvaluationCache`.

        Args:
            point_id: Id of the design point in the model.
            factors: Identity of the factors it is made of; "" for the dense model.
        """

    def evaluate(
        self, progress: Callable[[int, int], None] | None = None, *, share: float = 1.0, answers: Answers | None = None
    ) -> EvaluationResult:
        """Evaluate the model in its present state.

        Args:
            progress: Called as `progress(done, total)`.
            share: Share of each task's documents. A smaller share is a subset of every larger one.
            answers: Known answers of this state of the model. Their documents are not scored again, and new answers
                are added.

        Raises:
            ConfigError: `0 < share <= 1` does not hold.
            NonFiniteError: A score, an output or a metric is NaN or infinite.
            OutOfMemoryError: The device has no room for the smallest batch.
        """

    def within_share(self, share: float) -> Mapping[str, NDArray[np.bool_]]:
        """Task to a mask of its outcomes: whether the document is part of the share; shape (documents,)."""

    def digests(self, share: float = 1.0) -> list[str]:
        """Digests of the documents of a share: the keys of `Answers`."""


def evaluator_for(
    loaded: LoadedModel,
    tasks: Sequence[TaskConfig | DatasetTaskConfig],
    settings: EvaluationConfig,
    *,
    fresh: int = 0,
    batch_size: BatchSize | None = None,
) -> ModelEvaluator:
    """Load and check the tasks. The model must be dense at this time.

    Args:
        tasks: All lm-eval tasks, or all dataset tasks.
        fresh: Number of documents per task to draw beyond the limit, instead of those within it; 0 draws those within.
        batch_size: The batch size of another evaluator, to be shared with it; None makes one from the settings.

    Raises:
        TaskError: A task cannot be found, read or scored, or lacks the requested metric.
        ConfigError: A setting does not apply to these tasks.
        ModelError: The model does not have the head that the tasks need, or lacks the requested chat template.
    """
    on_datasets = [task for task in tasks if isinstance(task, DatasetTaskConfig)]
    by_lm_eval = [task for task in tasks if isinstance(task, TaskConfig)]
    if not on_datasets:
        from dse.evaluation.lm_eval import Evaluator  # takes seconds to import, which dataset tasks do not need

        return Evaluator(
            loaded,
            [TaskSpec(task.task, task.metric, task.weight, task.limit, task.num_fewshot) for task in by_lm_eval],
            limit=settings.limit,
            fresh=fresh,
            seed=settings.seed,
            batch_size=batch_size or settings.batch_size,
            max_length=settings.max_length,
            apply_chat_template=settings.apply_chat_template,
            masked_scoring=settings.masked_scoring,
        )
    from dse.evaluation.heads import HeadEvaluator

    if by_lm_eval:
        raise ConfigError("tasks must all be lm-eval tasks or all dataset tasks, but got both; keep one kind")
    if fresh:
        raise ConfigError("`fidelity.final_documents` is for lm-eval tasks, but these are dataset tasks; remove it")
    if settings.apply_chat_template:
        raise ConfigError("`apply_chat_template` is for lm-eval tasks, but these are dataset tasks; set it to false")
    return HeadEvaluator(
        loaded,
        on_datasets,
        limit=settings.limit,
        seed=settings.seed,
        batch_size=batch_size or settings.batch_size,
        max_length=settings.max_length,
    )
