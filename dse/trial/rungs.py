"""Evaluate the accuracy of a trial, on rungs if the study has them: proxy, shares of the documents, all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dse.evaluation import Answers, EvaluationCache, EvaluationResult, ModelEvaluator, TaskResult
from dse.evaluation.divergence import DenseDivergence, Divergence
from dse.evaluation.statistics.intervals import Interval, PairedInterval
from dse.measurement import device_in_use
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.search.multi_fidelity import PROXY_RUNG, EarlyStopping, Stop
from dse.trial.trial_run import TrialRun
from dse.trial_record import EvaluatedTrial, TrialRecord

__all__ = ["MultiFidelityEvaluator", "run_rungs", "with_evaluation"]

_NO_DROP = Interval(0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class MultiFidelityEvaluator:
    """What the evaluation of trials needs; built once per study.

    Attributes:
        loaded: The model.
        evaluator: Evaluates the tasks; None if the study has none.
        divergence: Measures the proxy and the objective `kl_divergence`; None if neither is used.
        cache: Keeps answers between rungs, runs and studies; None keeps none.
        shares: Shares of the documents, ascending, below 1: the rungs between the proxy and all documents.
        has_rungs: Whether records carry the rung that the trial reached.
    """

    loaded: LoadedModel
    evaluator: ModelEvaluator | None
    divergence: DenseDivergence | None
    cache: EvaluationCache | None
    shares: Sequence[float] = ()
    has_rungs: bool = False

    @property
    def top_rung(self) -> int:
        """The rung of all documents."""
        return PROXY_RUNG + len(self.shares) + 1

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Fingerprints of the documents and of the held-out text, which must stay the same throughout a study."""
        return {
            "evaluation_fingerprint": None if self.evaluator is None else self.evaluator.fingerprint,
            "divergence_fingerprint": None if self.divergence is None else self.divergence.fingerprint,
        }


def run_rungs(
    fidelity: MultiFidelityEvaluator,
    run: TrialRun,
    factors: str,
    early_stopping: EarlyStopping | None,
    baseline: EvaluatedTrial | None,
    on_phase: ProgressCallback = ignore_progress,
) -> Stop | None:
    """Evaluate the point in the model, rung by rung, until it is stopped or all documents are done.

    Answers are saved after every rung, so that a resumed trial continues where it ended.

    Args:
        fidelity: The evaluator.
        run: The trial; its record receives the results of each rung.
        factors: Identity of the point's factors; "" for the dense model.
        early_stopping: The stopping rule; None evaluates everything.
        baseline: The dense model's trial; None while it is itself evaluated.
        on_phase: Progress callback.

    Returns:
        The reason for stopping; None at the top.
    """
    identity = None if fidelity.evaluator is None else fidelity.evaluator.identity(run.record.point_id, factors)
    answers = Answers() if fidelity.cache is None or identity is None else fidelity.cache.read(identity)
    known = set(answers.by_document)

    def save() -> None:
        if fidelity.cache is not None and identity is not None:
            fidelity.cache.write(identity, answers)

    if fidelity.divergence is not None:
        with device_in_use(fidelity.loaded.device), run.timed("kl_divergence"):
            found = _proxy(fidelity.divergence, answers, on_phase, is_dense=run.record.is_dense)
        run.set_quantity("kl_divergence", found.interval)
        run.update(divergence_windows=tuple(float(value) for value in found.windows))
        if fidelity.evaluator is not None and fidelity.shares:
            save()
        _set_rung(fidelity, run, PROXY_RUNG)
        stop = None if early_stopping is None else early_stopping.decide(PROXY_RUNG, run.record)
        if stop is not None:
            return stop
    if fidelity.evaluator is None:
        return None
    for index, share in enumerate((*fidelity.shares, 1.0) if early_stopping is not None else (1.0,)):
        rung = fidelity.top_rung if share == 1.0 else PROXY_RUNG + 1 + index
        with device_in_use(fidelity.loaded.device), run.timed("evaluate"):
            evaluation = fidelity.evaluator.evaluate(
                lambda done, total: on_phase("evaluate", done, total), share=share, answers=answers
            )
        save()
        reused = sum(digest in known for digest in fidelity.evaluator.digests(share))
        run.update(cached_documents=reused, batch_tokens=evaluation.batch_tokens)
        _set_rung(fidelity, run, rung)
        if share < 1.0 and early_stopping is not None:
            stop = early_stopping.decide(rung, run.record, evaluation, fidelity.evaluator.within_share(share))
            if stop is not None:
                return stop
        elif share == 1.0:
            run.evaluation = evaluation
            run.record = with_evaluation(run.record, evaluation, None if baseline is None else baseline.evaluation)
    return None


def _set_rung(fidelity: MultiFidelityEvaluator, run: TrialRun, rung: int) -> None:
    if fidelity.has_rungs:
        run.update(rung=rung)


def _proxy(divergence: DenseDivergence, answers: Answers, on_phase: ProgressCallback, *, is_dense: bool) -> Divergence:
    """The KL divergence, from the answers if it is among them: the means of the text's windows."""
    if is_dense:
        return divergence.of_dense()
    key = f"kl_divergence {divergence.fingerprint}"
    known = answers.by_document.get(key)
    if known is not None and len(known) == 1 and len(known[0]) == divergence.windows:
        return divergence.of_windows([value for value in known[0] if isinstance(value, float)])
    found = divergence.measure(on_phase)
    answers.by_document[key] = [[float(value) for value in found.windows]]
    return found


def with_evaluation(record: TrialRecord, result: EvaluationResult, baseline: EvaluationResult | None) -> TrialRecord:
    """The record with accuracy, perplexity and graded metrics, each with its interval, and their paired drops.

    Args:
        record: The record so far.
        result: The trial's evaluation.
        baseline: The dense model's on the same documents; None while it is itself evaluated.
    """
    quantities, ratios, drops = dict(record.quantities), dict(record.ratios), dict(record.graded_drops)
    accuracy_drop: Interval | None = None
    if (accuracy := result.accuracy_interval()) is not None:
        quantities["accuracy"] = accuracy
        accuracy_drop = _NO_DROP if baseline is None else _finite(result.accuracy_drop(baseline))
    if (perplexity := result.perplexity_interval()) is not None:
        quantities["perplexity"] = perplexity
        if baseline is not None and (ratio := _finite(result.perplexity_ratio(baseline))) is not None:
            ratios["perplexity"] = ratio
    for name in result.graded_metrics:
        if (found := result.graded_interval(name)) is not None:
            quantities[name] = found
            drop = _NO_DROP if baseline is None else _finite(result.graded_drop(name, baseline))
            if drop is not None:
                drops[name] = drop
    return dataclasses.replace(
        record,
        quantities={name: interval for name, interval in quantities.items() if math.isfinite(interval.value)},
        ratios=ratios,
        accuracy_drop=accuracy_drop,
        graded_drops=drops,
        tasks={task.task: _task_entry(task) for task in result.tasks},
    )


def _finite(paired: PairedInterval | None) -> PairedInterval | None:
    return paired if paired is not None and math.isfinite(paired.value) else None


def _task_entry(task: TaskResult) -> dict[str, Any]:
    metrics = {name: [_known(value), _known(error)] for name, (value, error) in task.all_metrics.items()}
    for name, outcomes in task.graded.items():
        present = outcomes[~np.isnan(outcomes)]
        if present.size:
            error = float(present.std(ddof=1)) / math.sqrt(present.size) if present.size > 1 else None
            metrics[name] = [float(present.mean()), error]
    return {"metric": task.metric, "documents": task.documents, "metrics": metrics}


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
