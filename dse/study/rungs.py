"""One trial's way up the ladder: proxy, shares of the documents, all of them; each rung is kept before the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dse.evaluation import Answers, EvaluationCache, EvaluationResult, ModelEvaluator
from dse.evaluation.divergence import DenseDivergence, Divergence
from dse.measurement import device_in_use
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.search.multi_fidelity.early_stopping import PROXY_RUNG, EarlyStopping, Stop
from dse.study.point_run import PointRun
from dse.trial_record import Interval, TrialRecord

__all__ = ["MultiFidelityEvaluator", "run_rungs"]


@dataclasses.dataclass
class MultiFidelityEvaluator:
    """What climbing needs, built once per study.

    Attributes:
        loaded: The model.
        evaluator: None where the study has no tasks.
        divergence: Of the proxy and the objective `kl_divergence`; None where neither is asked for.
        cache: Where answers are kept between rungs, runs and studies; None keeps none.
        shares: Of the documents, ascending, below 1: the rungs between proxy and top.
        is_ladder: Whether trials carry the rung they reached.
    """

    loaded: LoadedModel
    evaluator: ModelEvaluator | None
    divergence: DenseDivergence | None
    cache: EvaluationCache | None
    shares: Sequence[float] = ()
    is_ladder: bool = False

    @property
    def top_rung(self) -> int:
        """The rung of all documents."""
        return PROXY_RUNG + len(self.shares) + 1


def run_rungs(
    climber: MultiFidelityEvaluator,
    run: PointRun,
    factors: str,
    judge: EarlyStopping | None,
    keep: Callable[[TrialRecord, EvaluationResult], TrialRecord],
    on_phase: ProgressCallback = ignore_progress,
) -> Stop | None:
    """Evaluate the point in the model rung by rung until the judge stops it or all documents are seen.

    Args:
        climber: What climbing needs.
        run: Its record gets what each rung finds.
        factors: Identity of the point's factors; "" for dense.
        judge: None evaluates everything.
        keep: Puts an evaluation on all documents into the record.
        on_phase: Told of progress.

    Returns:
        Why the trial stopped; None at the top.
    """
    identity = None if climber.evaluator is None else climber.evaluator.identity(run.record.point_id, factors)
    answers = Answers() if climber.cache is None or identity is None else climber.cache.read(identity)
    before = set(answers.by_document)

    def save() -> None:
        if climber.cache is not None and identity is not None:
            climber.cache.write(identity, answers)

    if climber.divergence is not None:
        with device_in_use(climber.loaded.device), run.timed("kl_divergence"):
            found = _divergence(climber, answers, on_phase, is_dense=not run.record.point["tensors"])
        interval = found.interval
        quantities = {
            **run.record.quantities,
            "kl_divergence": Interval(interval.value, interval.low, interval.high),
        }
        windows = tuple(float(value) for value in found.windows)
        run.record = dataclasses.replace(run.record, quantities=quantities, divergence_windows=windows)
        if climber.evaluator is not None and climber.shares:
            save()
        _reached(climber, run, PROXY_RUNG)
        stop = None if judge is None else judge.verdict(PROXY_RUNG, run.record)
        if stop is not None:
            return stop
    if climber.evaluator is None:
        return None
    for index, share in enumerate((*climber.shares, 1.0) if judge is not None else (1.0,)):
        rung = climber.top_rung if share == 1.0 else PROXY_RUNG + 1 + index
        with device_in_use(climber.loaded.device), run.timed("evaluate"):
            evaluation = climber.evaluator.evaluate(
                lambda done, total: on_phase("evaluate", done, total), share=share, answers=answers
            )
        save()
        reused = sum(digest in before for digest in climber.evaluator.digests(share))
        run.record = dataclasses.replace(run.record, cached_documents=reused)
        _reached(climber, run, rung)
        if share < 1.0 and judge is not None:
            stop = judge.verdict(rung, run.record, evaluation, climber.evaluator.within_share(share))
            if stop is not None:
                return stop
        elif share == 1.0:
            run.evaluation = evaluation
            run.record = keep(run.record, evaluation)
    return None


def _reached(climber: MultiFidelityEvaluator, run: PointRun, rung: int) -> None:
    if climber.is_ladder:
        run.record = dataclasses.replace(run.record, rung=rung)


def _divergence(
    climber: MultiFidelityEvaluator, answers: Answers, on_phase: ProgressCallback, *, is_dense: bool
) -> Divergence:
    """The proxy, from the answers where it is there: a text is a document, its windows' means are its answers."""
    meter = climber.divergence
    if meter is None:
        raise ValueError("a divergence is asked for, but there is no text for it")
    if is_dense:
        return meter.of_dense()
    key = f"kl_divergence {meter.fingerprint}"
    known = answers.by_document.get(key)
    if known is not None and len(known) == 1 and len(known[0]) == meter.windows:
        return meter.of_windows([value for value in known[0] if isinstance(value, float)])
    found = meter.measure(on_phase)
    answers.by_document[key] = [[float(value) for value in found.windows]]
    return found
