"""Evaluate a model on lm-eval tasks: built once per study, then called for every design point."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dse.errors import ModelError
from dse.evaluation.answers import Answers
from dse.evaluation.evaluator_settings import (
    BatchSize,
    answer_identity,
    batch_size_of,
    check_positive,
    last_place,
    ticker,
)
from dse.evaluation.lm_eval.document_subset import requests_to_ask, share_of_leaves, store_answers
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
from dse.evaluation.result import EvaluationResult, choose_metric
from dse.evaluation.scoring.masked_text import MaskedScoring
from dse.evaluation.task_spec import TaskSource, TaskSpec, check_task_names, resolve_task
from dse.models import LoadedModel, head_of

__all__ = ["Evaluator"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _PreparedTask:
    spec: TaskSpec
    name: str
    metric: str
    leaves: tuple[LeafTask, ...]


class Evaluator:
    """lm-eval on a fixed set of tasks and documents, for a model that changes between calls.

    The constructor loads the tasks, draws the documents and builds the requests, so every call scores exactly the same
    requests, including few-shot examples. Results are not reused between calls unless the caller passes `Answers`. The
    class implements `ModelEvaluator`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Sequence[TaskSpec],
        *,
        limit: int | None = None,
        fresh: int = 0,
        seed: int = 0,
        batch_size: int | str | BatchSize = "auto",
        max_length: int | None = None,
        apply_chat_template: bool = False,
        masked_scoring: MaskedScoring = "within_word",
    ) -> None:
        """Load and check the tasks.

        Args:
            loaded: The model. It must be dense now and may be in any state when it is evaluated.
            tasks: Tasks with distinct names.
            limit: Documents for each task without its own limit, drawn by `seed`; None means all.
            fresh: As in `evaluator_for`.
            seed: Seed of the documents and few-shot examples.
            batch_size: A batch has at most this many times 128 tokens, or fewer if the device is fastest with fewer.
                "auto" is 64 on a GPU and 16 elsewhere. Halved whenever the device runs out of memory.
            max_length: Tokens of context, None for the model's own limit. Longer requests lose their beginning; longer
                texts of a perplexity are scored in windows.
            apply_chat_template: Wrap each prompt in the tokenizer's chat template.
            masked_scoring: Pseudo-log-likelihood of a masked language model: which tokens are masked together.

        Raises:
            TaskError: A task cannot be found, read or scored, or lacks the requested metric.
            ConfigError: `limit`, `batch_size` or `max_length` is below 1.
            ModelError: The model has no language-model head, or lacks the requested chat template.
        """
        check_positive(limit=limit, max_length=max_length)
        self.batch_size = batch_size_of(batch_size, loaded.device.type)
        _check_model(loaded, needs_template=apply_chat_template)
        sources = [resolve_task(spec) for spec in tasks]
        check_task_names(source.name for source in sources)
        self._loaded, self._max_length, self._has_chat_template = loaded, max_length, apply_chat_template
        self._masking = "" if loaded.topology.is_decoder else f" {masked_scoring}"
        with quiet_lm_eval(), swallowed_output():
            self._lm: ScoringLM | MaskedScoringLM
            if loaded.topology.is_decoder:
                self._lm = ScoringLM(loaded, max_length=max_length)
            else:
                self._lm = MaskedScoringLM(loaded, max_length=max_length, scoring=masked_scoring)
            template = self._lm.apply_chat_template if apply_chat_template else None
            self._tasks = [
                _prepare(spec, source, limit=spec.limit or limit, fresh=fresh, seed=seed, chat_template=template)
                for spec, source in zip(tasks, sources, strict=True)
            ]
            leaves = [leaf for task in self._tasks for leaf in task.leaves]
            cut = self._lm.prepare([instance for leaf in leaves for instance in leaf.task.instances])
        if cut:
            _log.warning("%d requests are longer than the context and lose their beginning", cut)
        self.fingerprint = self._fingerprint()

    @property
    def documents(self) -> dict[str, list[int]]:
        """lm-eval task to the indices of its documents, ascending; a group has several tasks."""
        return {leaf.name: list(leaf.documents) for task in self._tasks for leaf in task.leaves}

    @property
    def metrics(self) -> dict[str, str]:
        """Task to its main metric."""
        return {task.name: task.metric for task in self._tasks}

    @property
    def graded(self) -> dict[str, tuple[str, ...]]:
        """Task to its graded metrics (see `dse.evaluation.graded_metrics`)."""
        return {task.name: graded_names(task.leaves) for task in self._tasks}

    def identity(self, point_id: str, factors: str) -> dict[str, str]:
        """See `ModelEvaluator.identity`."""
        details = {"max_length": str(self._max_length), "chat_template": str(self._has_chat_template)}
        scorer = type(self._lm).__name__ + self._masking
        return answer_identity(self._loaded, point_id, factors, "lm_eval", **details, scorer=scorer)

    def evaluate(
        self, progress: Callable[[int, int], None] | None = None, *, share: float = 1.0, answers: Answers | None = None
    ) -> EvaluationResult:
        """See `ModelEvaluator.evaluate`; `progress` counts requests."""
        start = time.perf_counter()
        known = Answers() if answers is None else answers
        tasks = [replace(task, leaves=tuple(share_of_leaves(task.leaves, share))) for task in self._tasks]
        leaves = [leaf for task in tasks for leaf in task.leaves]
        self._score(requests_to_ask(leaves, known), progress)
        store_answers(leaves, known)
        with quiet_lm_eval():
            results = tuple(task_result(t.name, t.metric, t.spec.weight, t.leaves) for t in tasks)
        return EvaluationResult(results, time.perf_counter() - start, self.batch_size.tokens)

    def within_share(self, share: float) -> dict[str, NDArray[np.bool_]]:
        """See `ModelEvaluator.within_share`."""
        masks = {}
        for task in self._tasks:
            last = last_place([place for leaf in task.leaves for place in leaf.places], share)
            masks[task.name] = np.asarray([place <= last for leaf in task.leaves for place in leaf.places])
        return masks

    def digests(self, share: float = 1.0) -> list[str]:
        """Digests of the documents of a share: the keys of `Answers`."""
        return [
            digest for task in self._tasks for leaf in share_of_leaves(task.leaves, share) for digest in leaf.digests
        ]

    def _score(self, asked: Sequence[Any], progress: Callable[[int, int], None] | None) -> None:
        """Score these requests and store the answers in them."""
        by_type: dict[str, list[Any]] = {}
        for instance in asked:
            by_type.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        tick = ticker(progress, sum(map(len, by_type.values())))
        with quiet_lm_eval():
            for kind, requests in by_type.items():
                answers = self._lm.answer(kind, requests, self.batch_size, tick)
                for request, answer in zip(requests, answers, strict=True):
                    request.resps.append(answer)

    def _fingerprint(self) -> str:
        head = f"lm_eval {importlib.metadata.version('lm_eval')} max_length {self._max_length}{self._masking}"
        digest = hashlib.sha256(head.encode())
        for task in self._tasks:
            digest.update(f"{task.name} {task.metric} {task.spec.weight}".encode())
            for part in (part for leaf in task.leaves for part in leaf.fingerprint_parts()):
                digest.update(part)
        return digest.hexdigest()[:16]


def _check_model(loaded: LoadedModel, *, needs_template: bool) -> None:
    is_encoder_decoder = getattr(loaded.model.config, "is_encoder_decoder", False)
    if is_encoder_decoder or not (loaded.topology.is_decoder or head_of(type(loaded.model)) == "masked_lm"):
        raise ModelError(
            f"lm-eval tasks need a decoder or a masked language model, but '{loaded.ref}' is "
            f"{loaded.topology.architecture}; use dataset tasks for its head (`dataset: ...`, `head: ...`)"
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


def _prepare(spec: TaskSpec, source: TaskSource, **drawing: Any) -> _PreparedTask:
    """Choose the main metric and, if possible, score dummy answers, so that defects show before the first trial."""
    leaves = build_leaves(spec, source, **drawing)
    with as_task_error(spec.task):
        is_dry = all(answer_with_dummies(leaf) for leaf in leaves)
        metrics = [list(collect_outcomes(leaf)) if is_dry else declared_metrics(leaf) for leaf in leaves]
        common = [metric for metric in metrics[0] if all(metric in others for others in metrics)]
        metric = choose_metric(source.name, common, spec.metric)
        if is_dry:
            task_result(source.name, metric, spec.weight, leaves)
    return _PreparedTask(spec, source.name, metric, tuple(leaves))
