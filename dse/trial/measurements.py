"""Measure latency, energy and memory of a trial's point, and put the results into its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dse.decomposition import AppliedPoint
from dse.engines import EnginePair
from dse.errors import InvalidMeasurementError, OutOfMemoryError
from dse.evaluation.statistics.intervals import Interval
from dse.measurement import (
    CellLatency,
    EnergyMeter,
    IdlePower,
    LatencySpec,
    PhaseLatency,
    device_in_use,
    device_lock,
    measure_cell,
    measure_paired_energy,
    measure_peak_memory,
)
from dse.measurement.device_profile import ModelProfile
from dse.models import LoadedModel
from dse.progress import ProgressCallback
from dse.trial.energy_quantities import paired_energy_entry, set_paired_energy
from dse.trial.engine_measurements import EngineMeasurer
from dse.trial.measurement_plan import MeasurementPlan
from dse.trial.objectives import RequiredMeasurements
from dse.trial.trial_run import TrialRun
from dse.trial_record import EvaluatedTrial, json_safe

__all__ = ["TrialMeasurer"]


@dataclass(frozen=True)
class TrialMeasurer:
    """Takes the measurements that the study requires, with exclusive use of the device.

    Attributes:
        loaded: The model.
        required: The measurements that the study requires.
        plan: How they are taken.
        on_phase: Progress callback.
        engine: The serving engine of a study that measures every trial in it; None for the resident model.
    """

    loaded: LoadedModel
    required: RequiredMeasurements
    plan: MeasurementPlan
    on_phase: ProgressCallback
    engine: EnginePair | None = None

    def measure(
        self, run: TrialRun, applied: AppliedPoint, baseline: EvaluatedTrial | None, idle: IdlePower | None
    ) -> None:
        """Measure the point, which is in the model before and after.

        Args:
            run: The trial; its record grows with each measurement, so that a later failure keeps the earlier ones.
            applied: The point in the model.
            baseline: The dense model's trial; None while it is itself measured.
            idle: The device's idle power, for net energy.

        Raises:
            InvalidMeasurementError: A measurement of an objective is not valid.
            OutOfMemoryError: The device is out of memory.
        """
        takes_latency, takes_serving = self.required.latency, self.required.serving
        latencies = self.required.latency or self.engine is not None
        if latencies and self.plan.predicts_latency and self.plan.profile is not None and baseline is not None:
            takes_latency = latencies = False
            takes_serving = takes_serving and self.required.needs_serving
            with device_lock(self.loaded.device):  # times the products that have no timing yet
                _predict_latency(run, self.plan, self.plan.profile, baseline)
        takes_energy = self.required.energy and self.plan.meter is not None
        if not (takes_latency or takes_energy or takes_serving or self.required.memory):
            return
        is_timed = takes_latency or takes_energy or takes_serving
        with (device_lock if is_timed else device_in_use)(self.loaded.device):
            applied.use_candidate()
            if takes_serving:
                server = EngineMeasurer(self.loaded, self.plan, self.engine, self.on_phase)
                energy = self.required.serving_energy and self.plan.meter is not None
                server.measure(run, applied, baseline, idle, energy=energy, latencies=latencies and bool(self.engine))
            if takes_latency:
                self._latency(run, applied, baseline)
            if self.required.energy and self.plan.meter is not None:
                self._energy(run, self.plan.meter, applied, baseline, idle)
            if self.required.memory:
                self._memory(run, baseline)

    def _latency(self, run: TrialRun, applied: AppliedPoint, baseline: EvaluatedTrial | None) -> None:
        """Measure all cells; the first one holds the objectives and must be valid."""
        with run.timed("latency"):
            cells: list[CellLatency] = []
            for spec in self.plan.cells:
                cells.append(self._cell(spec, applied))
                run.update(latency=_latency_entry(cells))
        first = cells[0]
        if first.latency is None:
            raise OutOfMemoryError(first.reason, first.bytes_asked)
        if not first.is_valid:
            raise InvalidMeasurementError(f"latency: {first.reason}")
        _set_phase_latency(run, "prefill_latency_s", first.latency.prefill, baseline)
        if first.latency.decode is not None:
            _set_phase_latency(run, "decode_latency_s", first.latency.decode, baseline)

    def _cell(self, spec: LatencySpec, applied: AppliedPoint) -> CellLatency:
        return measure_cell(
            self.loaded.model,
            spec,
            applied,
            progress=lambda done, total: self.on_phase("latency", done, total),
        )

    def _energy(
        self,
        run: TrialRun,
        meter: EnergyMeter,
        applied: AppliedPoint,
        baseline: EvaluatedTrial | None,
        idle: IdlePower | None,
    ) -> None:
        """Measure the energy of both sides in alternating windows."""
        self.on_phase("energy", 0, 1)
        with run.timed("energy"):
            energy = measure_paired_energy(
                self.loaded.model,
                self.plan.cells[0],
                meter,
                applied,
                idle=idle,
                windows=self.plan.energy_windows,
                precision=self.plan.energy_precision,
            )
        run.update(energy=paired_energy_entry(energy))
        if not energy.is_valid and self.required.valid_energy:
            raise InvalidMeasurementError(f"energy: {energy.reason}")
        set_paired_energy(run, energy, baseline)

    def _memory(self, run: TrialRun, baseline: EvaluatedTrial | None) -> None:
        self.on_phase("memory", 0, 1)
        per_token = run.record.cost.get("kv_cache_bytes_per_token")
        with run.timed("memory"):
            memory = measure_peak_memory(self.loaded.model, self.plan.cells[0], kv_cache_bytes_per_token=per_token)
        run.update(memory=_entry(memory))
        run.set_quantity_beside("peak_memory_bytes", Interval(float(memory.peak_bytes)), baseline)


def _predict_latency(run: TrialRun, plan: MeasurementPlan, profile: ModelProfile, baseline: EvaluatedTrial) -> None:
    """Predict each latency: the baseline's, minus the time that the point saves in matrix products."""
    for name, phase in plan.phases().items():
        dense = baseline.record.value(name)
        if dense is None:
            continue
        latency = profile.predicted_seconds(run.record.point, phase, dense)
        run.set_quantity_beside(name, Interval(latency), baseline)
        run.update(predicted=(*run.record.predicted, name))


def _set_phase_latency(run: TrialRun, name: str, phase: PhaseLatency, baseline: EvaluatedTrial | None) -> None:
    """Store a latency so that trials measured at different times compare.

    The machine drifts between trials, but the ratio of candidate to baseline is measured within one. So a trial's
    latency is its ratio times the baseline's latency in trial 0. The raw medians stay in the record's `latency`.
    """
    if baseline is None:
        value, spread = phase.baseline.median_s, phase.baseline.iqr_s / 2
        run.set_quantity(name, Interval(value, max(0.0, value - spread), value + spread), Interval(1.0, 1.0, 1.0))
        return
    dense = baseline.record.value(name)
    if dense is None:
        raise InvalidMeasurementError(f"'{name}' of the dense model must be known, but trial 0 did not measure it")
    measured = Interval(phase.ratio * dense, phase.ratio_low * dense, phase.ratio_high * dense)
    run.set_quantity(name, measured, Interval(phase.ratio, phase.ratio_low, phase.ratio_high))


def _latency_entry(cells: Sequence[CellLatency]) -> dict[str, Any]:
    """The first cell's measurement, with the other cells as a list."""
    first, *others = (_cell_entry(cell) for cell in cells)
    return {**first, "cells": others}


def _cell_entry(cell: CellLatency) -> dict[str, Any]:
    values = _entry(cell)
    return {**(values.pop("latency") or {}), **values, "cell": cell.spec.cell}


def _entry(result: Any) -> dict[str, Any]:
    """A frozen result as a JSON mapping."""
    entry: dict[str, Any] = json_safe(dataclasses.asdict(result))
    return entry
