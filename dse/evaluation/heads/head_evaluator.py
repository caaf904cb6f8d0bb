"""Evaluate a model with a classification, question-answering or embedding head on data sets."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dse.config import HEAD_METRICS, DatasetTaskConfig, Head
from dse.errors import ConfigError, ModelError, NonFiniteError, OutOfMemoryError, TaskError
from dse.evaluation.answers import Answers, DocumentAnswers
from dse.evaluation.heads.classification import ClassificationTask
from dse.evaluation.heads.dataset_rows import read_rows
from dse.evaluation.heads.embedding import EmbeddingTask
from dse.evaluation.heads.head_task import HeadTask, Tick
from dse.evaluation.heads.question_answering import QuestionAnsweringTask
from dse.evaluation.out_of_memory import out_of_memory_named
from dse.evaluation.result import EvaluationResult, TaskResult
from dse.evaluation.task_spec import check_unique
from dse.models import LoadedModel, context_tokens, head_of

__all__ = ["HeadEvaluator"]

_AUTO_ROWS = {"cuda": 64}
_AUTO_ROWS_ELSEWHERE = 16
_LONGEST: Mapping[Head, int] = {"classification": 512, "question_answering": 384, "embedding": 512}


class HeadEvaluator:
    """Tasks on data sets over a fixed set of documents, for a model that changes between calls.

    It takes the place of `Evaluator`, which runs lm-eval's tasks: data are read, documents drawn and encoded when it is
    made, so every call asks the same. Nothing of a call is kept for the next, unless the caller keeps `Answers`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Sequence[DatasetTaskConfig],
        *,
        limit: int | None = None,
        seed: int = 0,
        batch_size: int | str = 16,
        max_length: int | None = None,
    ) -> None:
        """Read the data and find every defect they have.

        Args:
            loaded: The model; make the evaluator while it is dense, then evaluate it in any state.
            tasks: What to evaluate, by different names, all for the head that the model has.
            limit: Documents for each task without a limit of its own, drawn by `seed`; None means all.
            seed: Draws documents.
            batch_size: A batch holds at most this many times 128 tokens; "auto" starts at 64 on a GPU (16 elsewhere)
                and halves where memory is full.
            max_length: Tokens of a text, None for 512 (384 for question answering) or the model's own limit.

        Raises:
            TaskError: Data cannot be had or read, or lack what the task needs.
            ConfigError: `limit`, `batch_size` or `max_length` is below 1.
            ModelError: The model does not have the head.
        """
        self._is_auto = batch_size == "auto"
        rows = _AUTO_ROWS.get(loaded.device.type, _AUTO_ROWS_ELSEWHERE) if self._is_auto else batch_size
        for name, value in (("limit", limit), ("batch_size", rows), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"`{name} >= 1` must hold for an evaluation, but got {name}={value!r}")
        if not tasks:
            raise TaskError("an evaluation must have at least one task, but got none")
        check_unique(task.task_name for task in tasks)
        self._loaded, self._rows = loaded, int(rows)
        self._tasks = [
            _prepared(loaded, task, limit=task.limit or limit, seed=seed, max_length=max_length, rows=self._rows)
            for task in tasks
        ]
        self.fingerprint = self._fingerprint()

    @property
    def documents(self) -> dict[str, list[int]]:
        """Indices of the documents evaluated, ascending, by task."""
        return {task.name: list(task.documents) for task in self._tasks}

    @property
    def metrics(self) -> dict[str, str]:
        """The metric that stands for each task."""
        return {task.name: task.config.chosen_metric for task in self._tasks}

    @property
    def graded(self) -> dict[str, tuple[str, ...]]:
        """The graded metrics of each task (see `dse.evaluation.graded_metrics`)."""
        return {task.name: task.graded_names for task in self._tasks}

    def identity(self, point_id: str, factors: str) -> dict[str, str]:
        """What an answer depends on beside the document: see `EvaluationCache`.

        Args:
            point_id: The design point in the model.
            factors: Identity of the factors it is made of; "" for the dense model.
        """
        return {
            "model": self._loaded.fingerprint,
            "point": point_id,
            "factors": factors,
            "dtype": str(self._loaded.dtype),
            "device": self._loaded.device.type,
            "scorer": type(self).__name__,
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        }

    def evaluate(
        self, progress: Callable[[int, int], None] | None = None, *, share: float = 1.0, answers: Answers | None = None
    ) -> EvaluationResult:
        """Evaluate the model as it is now.

        Args:
            progress: Called as documents finish, and once more at the end.
            share: Of each task's documents, the first drawn: a smaller share is a part of every larger one.
            answers: What this very state of the model has answered before; those documents are not asked again, and
                the answers of the others are added.

        Raises:
            ConfigError: `0 < share <= 1` does not hold.
            NonFiniteError: An output or a metric is NaN or infinite.
            OutOfMemoryError: The device has no room for a batch.
        """
        start = time.perf_counter()
        known = Answers() if answers is None else answers
        chosen = [_positions(task, share) for task in self._tasks]
        asked = [
            [position for position in positions if task.digests[position] not in known.by_document]
            for task, positions in zip(self._tasks, chosen, strict=True)
        ]
        known.scored = sum(map(len, asked))
        known.reused = sum(map(len, chosen)) - known.scored
        tick = _ticker(progress, known.scored)
        for task, positions in zip(self._tasks, asked, strict=True):
            if positions:
                found = self._answered(task, positions, tick)
                known.by_document.update({task.digests[position]: answer for position, answer in found.items()})
        results = tuple(_result(task, positions, known) for task, positions in zip(self._tasks, chosen, strict=True))
        return EvaluationResult(results, time.perf_counter() - start)

    def within_share(self, share: float) -> dict[str, NDArray[np.bool_]]:
        """Which of each task's outcomes, in their order, belong to the documents of a share; shape (documents,)."""
        return {task.name: np.isin(np.arange(len(task.documents)), _positions(task, share)) for task in self._tasks}

    def digests(self, share: float = 1.0) -> list[str]:
        """Of the documents of a share, as `Answers` know them."""
        return [task.digests[position] for task in self._tasks for position in _positions(task, share)]

    def _answered(self, task: HeadTask, positions: Sequence[int], tick: Tick) -> Mapping[int, DocumentAnswers]:
        while True:
            try:
                with out_of_memory_named(self._rows):
                    return task.answer(positions, self._rows, tick)
            except OutOfMemoryError:
                if not self._is_auto or self._rows == 1:
                    raise
                self._rows //= 2

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for task in self._tasks:
            digest.update(f"{task.name} {task.config.chosen_metric} {task.config.weight}".encode())
            for part in task.digests:
                digest.update(part.encode())
        return digest.hexdigest()[:16]


def _prepared(
    loaded: LoadedModel, task: DatasetTaskConfig, *, limit: int | None, seed: int, max_length: int | None, rows: int
) -> HeadTask:
    head = head_of(type(loaded.model))
    if head != task.head:
        has = "no head" if head == "embedding" else f"a {str(head).replace('_', '-')} head"
        raise ModelError(
            f"task '{task.task_name}' needs a model with {_named(task.head)}, but '{loaded.ref}' is loaded as"
            f" {type(loaded.model).__name__} with {has}; name a checkpoint that was trained for the task"
        )
    if loaded.tokenizer.pad_token_id is None:
        raise ModelError(
            f"tasks on data sets need a tokenizer with a padding token, but that of '{loaded.ref}' has none"
        )
    wanted = task.max_length or max_length or _LONGEST[task.head]
    longest = min(wanted, context_tokens(loaded.model) or wanted)
    drawn = read_rows(task, limit=limit, seed=seed)
    if task.head == "classification":
        return ClassificationTask(task, drawn, loaded, longest)
    if task.head == "question_answering":
        return QuestionAnsweringTask(task, drawn, loaded, longest)
    return EmbeddingTask(task, drawn, loaded, longest, rows)


def _named(head: Head) -> str:
    return "no head" if head == "embedding" else f"a {head.replace('_', '-')} head"


def _positions(task: HeadTask, share: float) -> list[int]:
    """Positions of the first documents drawn, in order."""
    if not 0 < share <= 1:
        raise ConfigError(f"`0 < share <= 1` must hold for a share of the documents, but got {share!r}")
    count = min(len(task.places), max(1, math.ceil(share * len(task.places) - 1e-9)))
    limit = sorted(task.places)[count - 1]
    return [position for position, place in enumerate(task.places) if place <= limit]


def _ticker(progress: Callable[[int, int], None] | None, total: int) -> Tick:
    done = 0

    def tick(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None and finished:
            progress(done, total)

    if progress is not None and not total:
        progress(1, 1)  # all of it was known: say that it is done
    return tick


def _result(task: HeadTask, positions: Sequence[int], known: Answers) -> TaskResult:
    answers = [known.by_document[task.digests[position]] for position in positions]
    outcomes = task.outcomes(positions, answers)
    metric = task.config.chosen_metric
    values = {name: float(outcomes[name].mean()) for name in HEAD_METRICS[task.config.head] if name in outcomes}
    errors = {name: _standard_error(outcomes[name]) for name in values}
    if not math.isfinite(values[metric]):
        raise NonFiniteError(f"'{metric}' of task '{task.name}' must be a finite number, but it is not")
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


def _standard_error(outcomes: NDArray[np.float64]) -> float | None:
    return float(outcomes.std(ddof=1)) / math.sqrt(outcomes.size) if outcomes.size > 1 else None
