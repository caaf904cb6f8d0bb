"""Evaluate a model with a classification, question-answering or embedding head on datasets."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dse.config import HEAD_METRICS, DatasetTaskConfig, Head
from dse.errors import ModelError, NonFiniteError
from dse.evaluation.answers import Answers
from dse.evaluation.evaluator_settings import (
    BatchSize,
    answer_identity,
    batch_size_of,
    check_positive,
    last_place,
    ticker,
)
from dse.evaluation.heads.classification import ClassificationTask
from dse.evaluation.heads.dataset_rows import read_rows
from dse.evaluation.heads.embedding import EmbeddingTask
from dse.evaluation.heads.head_task import HeadTask
from dse.evaluation.heads.question_answering import QuestionAnsweringTask
from dse.evaluation.result import EvaluationResult, TaskResult
from dse.evaluation.statistics.intervals import standard_error
from dse.evaluation.task_spec import check_task_names
from dse.models import LoadedModel, context_tokens, head_of

__all__ = ["HeadEvaluator"]

_LONGEST: Mapping[Head, int] = {"classification": 512, "question_answering": 384, "embedding": 512}


class HeadEvaluator:
    """Dataset tasks on a fixed set of documents, for a model that changes between calls.

    A `ModelEvaluator`, like `Evaluator`, which runs lm-eval tasks. The constructor reads the data and draws and encodes
    the documents, so every call evaluates the same inputs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Sequence[DatasetTaskConfig],
        *,
        limit: int | None = None,
        seed: int = 0,
        batch_size: int | str | BatchSize = "auto",
        max_length: int | None = None,
    ) -> None:
        """Read and check the data.

        Args:
            loaded: The model. It must be dense now and may be in any state when it is evaluated.
            tasks: Tasks with distinct names, all for the head of the model.
            limit: Documents for each task without its own limit, drawn by `seed`; None means all.
            batch_size: A batch has at most this many times 128 tokens, or "auto"; see `BatchSize`. Halved whenever
                the device runs out of memory.
            max_length: Tokens per text, None for 512 (384 for question answering) or the model's own limit.

        Raises:
            TaskError: Data is unavailable, unreadable, or lacks what the task needs.
            ConfigError: `limit`, `batch_size` or `max_length` is below 1.
            ModelError: The model does not have the head.
        """
        check_positive(limit=limit, max_length=max_length)
        self.batch_size = batch_size_of(batch_size, loaded.device.type)
        check_task_names(task.task_name for task in tasks)
        self._loaded = loaded
        self._tasks = [
            _prepared(
                loaded, task, limit=task.limit or limit, seed=seed, max_length=max_length, batch_size=self.batch_size
            )
            for task in tasks
        ]
        self.fingerprint = self._fingerprint()

    @property
    def documents(self) -> dict[str, list[int]]:
        """Task to the indices of its documents, ascending."""
        return {task.name: list(task.documents) for task in self._tasks}

    @property
    def metrics(self) -> dict[str, str]:
        """Task to its main metric."""
        return {task.name: task.config.chosen_metric for task in self._tasks}

    @property
    def graded(self) -> dict[str, tuple[str, ...]]:
        """Task to its graded metrics (see `dse.evaluation.graded_metrics`)."""
        return {task.name: task.graded_names for task in self._tasks}

    def identity(self, point_id: str, factors: str) -> dict[str, str]:
        """See `ModelEvaluator.identity`."""
        return answer_identity(self._loaded, point_id, factors, scorer=type(self).__name__)

    def evaluate(
        self, progress: Callable[[int, int], None] | None = None, *, share: float = 1.0, answers: Answers | None = None
    ) -> EvaluationResult:
        """See `ModelEvaluator.evaluate`; `progress` counts documents."""
        start = time.perf_counter()
        known = Answers() if answers is None else answers
        chosen = [_positions(task, share) for task in self._tasks]
        asked = [
            [position for position in positions if task.digests[position] not in known.by_document]
            for task, positions in zip(self._tasks, chosen, strict=True)
        ]
        known.scored = sum(map(len, asked))
        known.reused = sum(map(len, chosen)) - known.scored
        tick = ticker(progress, known.scored)
        for task, positions in zip(self._tasks, asked, strict=True):
            if positions:
                found = task.answer(positions, self.batch_size, tick)
                known.by_document.update({task.digests[position]: answer for position, answer in found.items()})
        results = tuple(_result(task, positions, known) for task, positions in zip(self._tasks, chosen, strict=True))
        return EvaluationResult(results, time.perf_counter() - start, self.batch_size.tokens)

    def within_share(self, share: float) -> dict[str, NDArray[np.bool_]]:
        """See `ModelEvaluator.within_share`."""
        return {task.name: np.isin(np.arange(len(task.documents)), _positions(task, share)) for task in self._tasks}

    def digests(self, share: float = 1.0) -> list[str]:
        """Digests of the documents of a share: the keys of `Answers`."""
        return [task.digests[position] for task in self._tasks for position in _positions(task, share)]

    def _fingerprint(self) -> str:
        parts = [
            f"{task.name} {task.config.chosen_metric} {task.config.weight}{''.join(task.digests)}"
            for task in self._tasks
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _prepared(
    loaded: LoadedModel,
    task: DatasetTaskConfig,
    *,
    limit: int | None,
    seed: int,
    max_length: int | None,
    batch_size: BatchSize,
) -> HeadTask:
    head = head_of(type(loaded.model))
    if head != task.head:
        raise ModelError(
            f"task '{task.task_name}' needs a model with {_head_name(task.head)}, but '{loaded.ref}' is loaded as"
            f" {type(loaded.model).__name__} with {_head_name(str(head))}; use a checkpoint trained for the task"
        )
    if loaded.tokenizer.pad_token_id is None:
        raise ModelError(f"dataset tasks need a tokenizer with a padding token, but that of '{loaded.ref}' has none")
    wanted = task.max_length or max_length or _LONGEST[task.head]
    longest = min(wanted, context_tokens(loaded.model) or wanted)
    drawn = read_rows(task, limit=limit, seed=seed)
    if task.head == "classification":
        return ClassificationTask(task, drawn, loaded, longest)
    if task.head == "question_answering":
        return QuestionAnsweringTask(task, drawn, loaded, longest)
    return EmbeddingTask(task, drawn, loaded, longest, batch_size)


def _head_name(head: str) -> str:
    return "no head" if head == "embedding" else f"a {head.replace('_', '-')} head"


def _positions(task: HeadTask, share: float) -> list[int]:
    """Positions of the documents of a share, ascending."""
    last = last_place(task.places, share)
    return [position for position, place in enumerate(task.places) if place <= last]


def _result(task: HeadTask, positions: Sequence[int], known: Answers) -> TaskResult:
    answers = [known.by_document[task.digests[position]] for position in positions]
    outcomes = task.outcomes(positions, answers)
    metric = task.config.chosen_metric
    values = {name: float(outcomes[name].mean()) for name in HEAD_METRICS[task.config.head] if name in outcomes}
    errors = {name: standard_error(outcomes[name]) for name in values}
    if not math.isfinite(values[metric]):
        raise NonFiniteError(
            f"'{metric}' of task '{task.name}' must be a finite number, but is not; the trial is invalid"
        )
    return TaskResult(
        task=task.name,
        metric=metric,
        value=values[metric],
        stderr=errors[metric],
        documents=len(positions),
        higher_is_better=True,
        outcomes=outcomes[metric],
        all_metrics={name: (values[name], errors[name]) for name in values},
        weight=task.config.weight,
        kind="accuracy",
        graded=task.graded(answers),
    )
