"""Latency, energy and memory of the point that is in the model, and what of them its record carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from dse.decomposition import AppliedPoint
from dse.errors import InvalidMeasurementError
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
from dse.study.point_run import PointRun, Reference
from dse.study.record import Interval, TrialRecord, finite

__all__ = ["PhaseListener", "PointMeasurer"]

_LATENCY_ATTEMPTS = 5

PhaseListener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PointMeasurer:
    """Measures what the study needs, with the device to itself."""

    loaded: LoadedModel
    needs: Needs
    latency_spec: LatencySpec
    meter: EnergyMeter | None
    on_phase: PhaseListener

    def measure(self, run: PointRun, applied: AppliedPoint, reference: Reference | None) -> None:
        """Fill in latency, energy and memory; the point is in the model before and after.

        Args:
            run: Its record grows with each measurement, so that a later failure keeps the earlier ones.
            applied: The point.
            reference: The dense model's figures; None while it is itself being measured.

        Raises:
            InvalidMeasurementError: A measurement that an objective needs cannot be trusted.
            OutOfMemoryError: The device has no room.
        """
        lock = device_lock(self.loaded.device) if self.needs.latency or self.needs.energy else nullcontext()
        with lock:
            if self.needs.latency:
                self._latency(run, applied, reference)
            if self.needs.energy and self.meter is not None:
                self._energy(run, self.meter, reference)
            if self.needs.memory:
                self._memory(run, reference)

    def _latency(self, run: PointRun, applied: AppliedPoint, reference: Reference | None) -> None:
        discarded: list[str] = []
        with run.timed("latency"):
            latency = self._latency_once(applied)
            # The machine was disturbed: another look is cheaper than a lost trial.
            while not latency.is_valid and len(discarded) + 1 < _LATENCY_ATTEMPTS:
                discarded.append(latency.reason)
                latency = self._latency_once(applied)
        entry = {**_json_safe(latency), "attempts": len(discarded) + 1, "discarded": discarded}
        run.record = dataclasses.replace(run.record, latency=entry)
        if not latency.is_valid:
            raise InvalidMeasurementError(f"latency: {latency.reason}")
        run.record = _with_phase_latency(run.record, "prefill_latency_s", latency.prefill, reference)
        if latency.decode is not None:
            run.record = _with_phase_latency(run.record, "decode_latency_s", latency.decode, reference)

    def _latency_once(self, applied: AppliedPoint) -> PairedLatency:
        return measure_latency(
            self.loaded.model,
            self.latency_spec,
            use_subject=applied.use_point,
            use_dense=applied.use_dense,
            progress=lambda done, total: self.on_phase("latency", done, total),
        )

    def _energy(self, run: PointRun, meter: EnergyMeter, reference: Reference | None) -> None:
        self.on_phase("energy", 0, 1)
        with run.timed("energy"):
            energy = measure_energy(self.loaded.model, self.latency_spec, meter)
        entry = {**_json_safe(energy), "is_valid": energy.is_valid, "reason": energy.reason}
        run.record = dataclasses.replace(run.record, energy=entry)
        for name in ("prefill_energy_j", "energy_per_token_j"):
            run.record = _with_quantity(run.record, name, getattr(energy, name), reference)

    def _memory(self, run: PointRun, reference: Reference | None) -> None:
        self.on_phase("memory", 0, 1)
        with run.timed("memory"):
            memory = measure_peak_memory(self.loaded.model, self.latency_spec)
        run.record = dataclasses.replace(run.record, memory=_json_safe(memory))
        run.record = _with_quantity(run.record, "peak_memory_bytes", float(memory.peak_bytes), reference)


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


def _json_safe(value: Any) -> Any:
    """A frozen result as JSON: nested dataclasses to mappings, what is not finite to None."""
    return finite(dataclasses.asdict(value))
