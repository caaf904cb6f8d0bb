"""One point in, one record out: decompose, evaluate, measure. Knows nothing of Optuna."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from dse.cost import cost
from dse.decomposition import AppliedPoint, FactorBank, apply_point
from dse.design_point import DesignPoint
from dse.errors import DseError, InvalidMeasurementError, OutOfMemoryError, StudyError, TrialError
from dse.evaluation import EvaluationResult, Evaluator
from dse.measurement import (
    EnergyMeter,
    LatencySpec,
    PairedLatency,
    PhaseLatency,
    device_lock,
    measure_energy,
    measure_latency,
    measure_peak_memory,
)
from dse.models import LoadedModel
from dse.study.objectives import Needs
from dse.study.record import Interval, TrialRecord
from dse.topology import Topology

__all__ = ["PointEvaluator", "Reference", "point_text"]

logger = logging.getLogger("dse")

_LATENCY_RETRIES = 4

PhaseListener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reference:
    """What the dense model measured: every drop and ratio of the study refers to it."""

    evaluation: EvaluationResult | None
    record: TrialRecord


@dataclass
class PointEvaluator:
    """Everything that evaluating a point needs, built once per study."""

    loaded: LoadedModel
    bank: FactorBank
    needs: Needs
    evaluator: Evaluator | None
    latency_spec: LatencySpec
    meter: EnergyMeter | None
    on_phase: PhaseListener = field(default=lambda phase, done, total: None)

    def evaluate(
        self, blank: TrialRecord, point: DesignPoint, reference: Reference | None
    ) -> tuple[TrialRecord, EvaluationResult | None]:
        """Evaluate one point on the resident model, which is dense again afterwards whatever happens.

        Args:
            blank: The record so far: number, point, origin, cost.
            point: What to decompose.
            reference: The dense model's figures; None while it is itself being measured.

        Returns:
            The record, and the evaluation with its per-document outcomes. A trial that failed is a record too: its
            reason is in it, and what was measured before it failed.
        """
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run = _Run(dataclasses.replace(blank, started_at=started_at))
        try:
            with _failures_of_a_trial():
                self._run(run, point, reference)
        except TrialError as error:
            reason = str(error) if type(error) is TrialError else f"{type(error).__name__}: {error}"
            return run.finished("failed", reason), run.evaluation
        return run.finished("complete"), run.evaluation

    def _run(self, run: _Run, point: DesignPoint, reference: Reference | None) -> None:
        applied = None
        self.on_phase("decompose", 0, 1)
        try:
            with run.timed("decompose"):
                applied = apply_point(self.loaded.model, self.loaded.topology, point, self.bank)
            if self.evaluator is not None:
                with run.timed("evaluate"):
                    run.evaluation = self.evaluator.evaluate(lambda done, total: self.on_phase("evaluate", done, total))
                run.record = _with_evaluation(run.record, run.evaluation, reference)
            lock = device_lock(self.loaded.device) if self.needs.latency or self.needs.energy else nullcontext()
            with lock:
                self._measure(run, applied, reference)
        finally:
            if applied is not None:
                with run.timed("undo"):
                    applied.undo()

    def check_device(self) -> None:
        """Ask the model's device for a sign of life, after a trial that failed.

        Raises:
            StudyError: It is lost, and with it every further trial of this process.
        """
        import torch

        if self.loaded.device.type == "cpu":
            return
        try:
            torch.ones(1, device=self.loaded.device).add(1).item()
        except RuntimeError as error:
            raise StudyError(
                f"{self.loaded.device} must answer, but is lost ({' '.join(str(error).split())[:200]}); every finished"
                " trial is kept, run the same command again to go on"
            ) from error

    def _latency(self, applied: AppliedPoint) -> PairedLatency:
        return measure_latency(
            self.loaded.model,
            self.latency_spec,
            use_subject=applied.use_point,
            use_dense=applied.use_dense,
            progress=lambda done, total: self.on_phase("latency", done, total),
        )

    def _measure(self, run: _Run, applied: AppliedPoint, reference: Reference | None) -> None:
        """Latency, energy and memory; the point is in the model before and after."""
        model = self.loaded.model
        if self.needs.latency:
            with run.timed("latency"):
                latency = self._latency(applied)
                for _ in range(
                    _LATENCY_RETRIES
                ):  # the machine was disturbed: another look is cheaper than a lost trial
                    if latency.is_valid:
                        break
                    latency = self._latency(applied)
            run.record = dataclasses.replace(run.record, latency=_json_safe(latency))
            if not latency.is_valid:
                raise InvalidMeasurementError(f"latency: {latency.reason}")
            run.record = _with_phase_latency(run.record, "prefill_latency_s", latency.prefill, reference)
            if latency.decode is not None:
                run.record = _with_phase_latency(run.record, "decode_latency_s", latency.decode, reference)
        if self.needs.energy and self.meter is not None:
            self.on_phase("energy", 0, 1)
            with run.timed("energy"):
                energy = measure_energy(model, self.latency_spec, self.meter)
            entry = {**_json_safe(energy), "is_valid": energy.is_valid, "reason": energy.reason}
            run.record = dataclasses.replace(run.record, energy=entry)
            for name in ("prefill_energy_j", "energy_per_token_j"):
                run.record = _with_quantity(run.record, name, getattr(energy, name), reference)
        if self.needs.memory:
            self.on_phase("memory", 0, 1)
            with run.timed("memory"):
                memory = measure_peak_memory(model, self.latency_spec)
            run.record = dataclasses.replace(run.record, memory=_json_safe(memory))
            run.record = _with_quantity(run.record, "peak_memory_bytes", float(memory.peak_bytes), reference)


@dataclass
class _Run:
    """One evaluation under way: the record as far as it goes."""

    record: TrialRecord
    evaluation: EvaluationResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of a block to the record."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = time.perf_counter() - begin

    def finished(self, state: str, reason: str = "") -> TrialRecord:
        """The record with its outcome."""
        seconds = {**self.seconds, "total": sum(self.seconds.values())}
        return dataclasses.replace(self.record, state=state, reason=reason, seconds=seconds)


def blank_record(trial: int, point: DesignPoint, topology: Topology, origin: str, feasible: bool = True) -> TrialRecord:
    """The record of a point before anything is measured: its cost is known already."""
    return TrialRecord(
        trial=trial,
        state="failed",
        origin=origin,
        point=point.to_json(),
        point_id=point.id,
        point_text=point_text(point, topology),
        feasible=feasible,
        cost=cost(topology, point).to_json(),
    )


def point_text(point: DesignPoint, topology: Topology) -> str:
    """The shortest JSON text of a point: compact where it is uniform."""
    compact = {} if point.is_dense else point.compact(topology)
    return json.dumps(point.to_json() if compact is None else compact, separators=(", ", ": "))


def _with_evaluation(record: TrialRecord, result: EvaluationResult, reference: Reference | None) -> TrialRecord:
    quantities, ratios, drop = dict(record.quantities), dict(record.ratios), None
    dense = None if reference is None else reference.evaluation
    accuracy = result.accuracy_interval()
    if accuracy is not None:
        quantities["accuracy"] = Interval(accuracy.estimate, accuracy.low, accuracy.high)
        drop = Interval(0.0, 0.0, 0.0) if reference is None else None
    perplexity = result.perplexity_interval()
    if perplexity is not None:
        quantities["perplexity"] = Interval(perplexity.estimate, perplexity.low, perplexity.high)
    if dense is not None:
        paired_drop, ratio = result.accuracy_drop(dense), result.perplexity_ratio(dense)
        if paired_drop is not None:
            drop = Interval(paired_drop.estimate, paired_drop.low, paired_drop.high)
        if ratio is not None:
            ratios["perplexity"] = Interval(ratio.estimate, ratio.low, ratio.high)
    tasks = {
        task.task: {
            "metric": task.metric,
            "documents": task.documents,
            "metrics": {name: list(pair) for name, pair in task.all_metrics.items()},
        }
        for task in result.tasks
    }
    return dataclasses.replace(record, quantities=quantities, ratios=ratios, accuracy_drop=drop, tasks=_finite(tasks))


def _with_phase_latency(
    record: TrialRecord, name: str, phase: PhaseLatency, reference: Reference | None
) -> TrialRecord:
    """Keep a latency so that trials of different minutes compare: paired ratio x the dense reference.

    The machine drifts between trials; the ratio was measured within one and does not. So the value of a trial is its
    ratio to the dense model beside it, times what the dense model took in trial 0. The raw medians stay in `latency`.
    """
    if reference is None:
        value = phase.dense.median_s
        spread = phase.dense.iqr_s / 2
        ratio = Interval(1.0, 1.0, 1.0)
        measured = Interval(value, max(0.0, value - spread), value + spread)
    else:
        dense = reference.record.quantities[name].value
        if dense is None:
            raise InvalidMeasurementError(f"'{name}' of the dense model must be known, but trial 0 did not measure it")
        ratio = Interval(phase.ratio, phase.ratio_low, phase.ratio_high)
        measured = Interval(phase.ratio * dense, phase.ratio_low * dense, phase.ratio_high * dense)
    return dataclasses.replace(
        record, quantities={**record.quantities, name: measured}, ratios={**record.ratios, name: ratio}
    )


def _with_quantity(record: TrialRecord, name: str, value: float | None, reference: Reference | None) -> TrialRecord:
    if value is None:
        return record
    quantities, ratios = {**record.quantities, name: Interval(value)}, dict(record.ratios)
    if reference is not None:
        dense = reference.record.quantities.get(name)
        if dense is not None and dense.value:
            ratios[name] = Interval(value / dense.value)
    return dataclasses.replace(record, quantities=quantities, ratios=ratios)


@contextmanager
def _failures_of_a_trial() -> Iterator[None]:
    """A lack of memory, a failed kernel or a damaged file ends this trial, not the study."""
    import torch

    try:
        yield
    except DseError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"the device must have room for this point, but: {' '.join(str(error).split())[:300]}"
        ) from error
    except Exception as error:  # a model's own code raises anything; where it did stands in the log
        logger.info("a trial failed", exc_info=True)
        raise TrialError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _json_safe(value: Any) -> Any:
    """A frozen result as JSON: nested dataclasses to mappings, what is not finite to None."""
    return _finite(dataclasses.asdict(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else str(value)
