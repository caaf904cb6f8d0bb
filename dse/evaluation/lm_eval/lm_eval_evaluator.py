"""Evaluate a model with lm-eval's tasks: built once for a study, then called for every design point."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dse.errors import ConfigError, ModelError, OutOfMemoryError, TaskError
from dse.evaluation.answers import Answers
from dse.evaluation.lm_eval.document_subset import keep_answers, requests_to_ask, share_of_leaves
from dse.evaluation.lm_eval.graded_outcomes import graded_names
from dse.evaluation.lm_eval.language_model import ScoringLM
from dse.evaluation.lm_eval.logging_control import quiet_lm_eval, swallowed_output
from dse.evaluation.lm_eval.masked_language_model import MaskedScoringLM
from dse.evaluation.lm_eval.task_loading import (
    LeafTask,
    answer_with_dummies,
    as_task_error,
    build_leaves,
    collect_outcomes,
    declared_metrics,
)
from dse.evaluation.lm_eval.task_results import task_result
from dse.evaluation.out_of_memory import out_of_memory_named
from dse.evaluation.result import EvaluationResult, choose_metric
from dse.evaluation.scoring.masked_text import MaskedScoring
from dse.evaluation.task_spec import TaskSpec, check_unique, resolve_task
from dse.models import LoadedModel, head_of

__all__ = ["Evaluator", "Progress"]

Progress = Callable[[int, int], None]
"""Called as `progress(requests done, requests in all)`."""

_log = logging.getLogger(__name__)
_AUTO_ROWS = {"cuda": 64}
_AUTO_ROWS_ELSEWHERE = 16


@dataclass(frozen=True, eq=False)
class _PreparedTask:
    spec: TaskSpec
    name: str
    metric: str
    leaves: tuple[LeafTask, ...]


class Evaluator:
    """lm-eval over a fixed set of tasks and documents, for a model that changes between calls.

    Tasks are loaded, documents drawn and requests built when it is made, so every call scores exactly the same
    requests, few-shot examples included. Nothing of a call is kept for the next, unless the caller keeps `Answers`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Sequence[TaskSpec],
        *,
        limit: int | None = None,
        fresh: int = 0,
        seed: int = 0,
        batch_size: int | str = 16,
        max_length: int | None = None,
        apply_chat_template: bool = False,
        masked_scoring: MaskedScoring = "within_word",
    ) -> None:
        """Load the tasks and find every defect they have.

        Args:
            loaded: The model; make the evaluator while it is dense, then evaluate it in any state.
            tasks: What to evaluate, by different names.
            limit: Documents for each task without a limit of its own, drawn by `seed`; None means all.
            fresh: Documents for each task beyond those of its limit, in their place; 0 takes those of the limit.
            seed: Draws documents and few-shot examples.
            batch_size: A batch holds at most this many times 128 tokens, and on a CPU no more than serve it; "auto"
                starts at 64 on a GPU (16 elsewhere) and halves where memory is full.
            max_length: Tokens of context, None for the model's own; longer requests lose their beginning, longer
                texts of a perplexity are scored window by window.
            apply_chat_template: Wrap each prompt in the tokenizer's chat template.
            masked_scoring: Pseudo-log-likelihood of a masked language model: which tokens are hidden together.

        Raises:
            TaskError: A task cannot be found, read or scored, or lacks the metric asked for.
            ConfigError: `limit`, `batch_size` or `max_length` is below 1.
            ModelError: The model has no language-model head, or no chat template though one was asked for.
        """
        self._is_auto = batch_size == "auto"
        rows = _AUTO_ROWS.get(loaded.device.type, _AUTO_ROWS_ELSEWHERE) if self._is_auto else batch_size
        for name, value in (("limit", limit), ("batch_size", rows), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"`{name} >= 1` must hold for an evaluation, but got {name}={value!r}")
        _check_model(loaded, tasks, needs_template=apply_chat_template)
        sources = [resolve_task(spec) for spec in tasks]
        check_unique(source.name for source in sources)
        self._loaded, self._max_length, self._has_chat_template = loaded, max_length, apply_chat_template
        self._masking = "" if loaded.topology.is_decoder else f" {masked_scoring}"
        with quiet_lm_eval(), swallowed_output():
            self._lm: ScoringLM | MaskedScoringLM
            if loaded.topology.is_decoder:
                self._lm = ScoringLM(loaded, batch_size=int(rows), max_length=max_length)
            else:
                self._lm = MaskedScoringLM(loaded, batch_size=int(rows), max_length=max_length, scoring=masked_scoring)
            template = self._lm.apply_chat_template if apply_chat_template else None
            self._tasks = [
                _prepare(
                    spec,
                    source.name,
                    build_leaves(
                        spec, source, limit=spec.limit or limit, fresh=fresh, seed=seed, chat_template=template
                    ),
                )
                for spec, source in zip(tasks, sources, strict=True)
            ]
            cut = self._lm.prepare(list(self._instances()))
        if cut:
            _log.warning("%d requests are longer than the context and lose their beginning", cut)
        self.fingerprint = self._fingerprint()

    @property
    def documents(self) -> dict[str, list[int]]:
        """Indices of the documents evaluated, ascending, by lm-eval task (a group has several)."""
        return {leaf.name: list(leaf.documents) for task in self._tasks for leaf in task.leaves}

    @property
    def metrics(self) -> dict[str, str]:
        """The metric that stands for each task."""
        return {task.name: task.metric for task in self._tasks}

    @property
    def graded(self) -> dict[str, tuple[str, ...]]:
        """The graded metrics of each task (see `dse.evaluation.graded_metrics`)."""
        return {task.name: graded_names(task.leaves) for task in self._tasks}

    def identity(self, point_id: str, factors: str) -> dict[str, str]:
        """What an answer depends on beside the document: see `EvaluationCache`.

        Args:
            point_id: The design point in the model.
            factors: Identity of the factors it is made of; "" for the dense model.
        """
        packages = ("torch", "transformers", "lm_eval")
        return {
            "model": self._loaded.fingerprint,
            "point": point_id,
            "factors": factors,
            "dtype": str(self._loaded.dtype),
            "device": self._loaded.device.type,
            "max_length": str(self._max_length),
            "chat_template": str(self._has_chat_template),
            "scorer": type(self._lm).__name__ + self._masking,
            **{package: importlib.metadata.version(package) for package in packages},
        }

    def evaluate(
        self, progress: Progress | None = None, *, share: float = 1.0, answers: Answers | None = None
    ) -> EvaluationResult:
        """Evaluate the model as it is now.

        Args:
            progress: Called as requests finish, and once more at the end.
            share: Of each task's documents, the first drawn: a smaller share is a part of every larger one.
            answers: What this very state of the model has answered before; those documents are not asked again, and
                the answers of the others are added.

        Raises:
            ConfigError: `0 < share <= 1` does not hold.
            NonFiniteError: A log-likelihood or a metric is NaN or infinite.
            OutOfMemoryError: The device has no room for a batch.
        """
        start = time.perf_counter()
        known = Answers() if answers is None else answers
        tasks = [replace(task, leaves=tuple(share_of_leaves(task.leaves, share))) for task in self._tasks]
        leaves = [leaf for task in tasks for leaf in task.leaves]
        while True:
            try:
                self._score(requests_to_ask(leaves, known), progress)
                break
            except OutOfMemoryError:
                if not self._is_auto or self._lm.rows == 1:
                    raise
                self._lm.rows //= 2
        keep_answers(leaves, known)
        with quiet_lm_eval():
            results = tuple(task_result(t.name, t.metric, t.spec.weight, t.leaves) for t in tasks)
        return EvaluationResult(results, time.perf_counter() - start)

    def within_share(self, share: float) -> dict[str, NDArray[np.bool_]]:
        """Which of each task's outcomes, in their order, belong to the documents of a share; shape (documents,)."""
        masks = {}
        for task in self._tasks:
            kept = {
                (leaf.name, document) for leaf in share_of_leaves(task.leaves, share) for document in leaf.documents
            }
            flags = [(leaf.name, document) in kept for leaf in task.leaves for document in leaf.documents]
            masks[task.name] = np.asarray(flags, dtype=np.bool_)
        return masks

    def digests(self, share: float = 1.0) -> list[str]:
        """Of the documents of a share, as `Answers` know them."""
        return [
            digest for task in self._tasks for leaf in share_of_leaves(task.leaves, share) for digest in leaf.digests
        ]

    def _instances(self) -> Iterator[Any]:
        for task in self._tasks:
            for leaf in task.leaves:
                yield from leaf.task.instances

    def _score(self, asked: Sequence[Any], progress: Progress | None) -> None:
        """Ask the model these requests; the answers are left in them."""
        by_type: dict[str, list[Any]] = {}
        for instance in asked:
            by_type.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        total, done = sum(map(len, by_type.values())), 0

        def tick(finished: int) -> None:
            nonlocal done
            done += finished
            if progress is not None:
                progress(done, total)

        self._lm.tick = tick
        with quiet_lm_eval(), out_of_memory_named(self._lm.rows):
            for kind, requests in by_type.items():
                for request, answer in zip(requests, getattr(self._lm, kind)(requests), strict=True):
                    request.resps.append(answer)
        if progress is not None and not asked:
            progress(1, 1)  # all of it was known: say that it is done

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        digest.update(f"lm_eval {importlib.metadata.version('lm_eval')} max_length {self._max_length}".encode())
        digest.update(self._masking.encode())
        for task in self._tasks:
            digest.update(f"{task.name} {task.metric} {task.spec.weight}".encode())
            for leaf in task.leaves:
                for part in leaf.fingerprint_parts():
                    digest.update(part)
        return digest.hexdigest()[:16]


def _check_model(loaded: LoadedModel, tasks: Sequence[TaskSpec], *, needs_template: bool) -> None:
    if not tasks:
        raise TaskError("an evaluation must have at least one task, but got none")
    is_encoder_decoder = getattr(loaded.model.config, "is_encoder_decoder", False)
    if is_encoder_decoder or not (loaded.topology.is_decoder or head_of(type(loaded.model)) == "masked_lm"):
        raise ModelError(
            f"lm-eval tasks need a decoder or a masked language model, but '{loaded.ref}' is "
            f"{loaded.topology.architecture}; name a data set that fits its head (`dataset: ...`, `head: ...`)"
        )
    if needs_template and not loaded.topology.is_decoder:
        raise ModelError(
            f"`apply_chat_template` is for models that generate, but '{loaded.ref}' is a masked language model; set it"
            f" to false"
        )
    if needs_template and not loaded.tokenizer.chat_template:
        raise ModelError(
            f"`apply_chat_template` needs a tokenizer with a chat template, but that of '{loaded.ref}' has none; "
            f"set it to false"
        )


def _prepare(spec: TaskSpec, name: str, leaves: Sequence[LeafTask]) -> _PreparedTask:
    """Choose the metric, and score made-up answers where that can be: every defect shows before the first trial."""
    with as_task_error(spec.task):
        is_dry = all(answer_with_dummies(leaf) for leaf in leaves)
        metrics = [list(collect_outcomes(leaf)) if is_dry else declared_metrics(leaf) for leaf in leaves]
        common = [metric for metric in metrics[0] if all(metric in others for others in metrics)]
        metric = choose_metric(name, common, spec.metric)
        if is_dry:
            task_result(name, metric, spec.weight, leaves)
    return _PreparedTask(spec, name, metric, tuple(leaves))
