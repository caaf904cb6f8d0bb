"""Latency, energy and memory of the point that is in the model, and what of them its record carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from dse.decomposition import AppliedPoint
from dse.design_point import DesignPoint
from dse.errors import InvalidMeasurementError, OutOfMemoryError
from dse.measurement import (
    CellLatency,
    EnergyMeter,
    EnergyResult,
    EnergySpread,
    LatencySpec,
    PhaseLatency,
    device_lock,
    measure_cell,
    measure_energy,
    measure_peak_memory,
)
from dse.models import LoadedModel
from dse.runtime import Sides
from dse.study.measurement_plan import MeasurementPlan
from dse.study.objectives import RequiredMeasurements
from dse.study.point_run import PointRun, Reference
from dse.trial_record import Interval, TrialRecord, finite

__all__ = ["PhaseListener", "PointMeasurer"]

PhaseListener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PointMeasurer:
    """Measures what the study needs, with the device to itself."""

    loaded: LoadedModel
    required: RequiredMeasurements
    plan: MeasurementPlan
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
        is_predicted = self.plan.predicts_latency and reference is not None
        if self.required.latency and is_predicted and reference is not None:
            with device_lock(self.loaded.device):  # products that are not timed yet are timed now
                _predict_latency(run, self.plan, reference)
        takes_latency = self.required.latency and not is_predicted
        takes_energy = self.required.energy and self.plan.meter is not None
        if not (takes_latency or takes_energy or self.required.memory):
            return
        lock = device_lock(self.loaded.device) if takes_latency or takes_energy else nullcontext()
        with lock, self.plan.sides(applied) as sides:
            sides.use_candidate()
            if takes_latency:
                self._latency(run, sides, reference)
            if self.required.energy and self.plan.meter is not None:
                self._energy(run, self.plan.meter, reference)
            if self.required.memory:
                self._memory(run, reference)

    def _latency(self, run: PointRun, sides: Sides, reference: Reference | None) -> None:
        """The first cell is the objectives' and must be valid; what became of the others is recorded."""
        with run.timed("latency"):
            cells = []
            for spec in self.plan.cells:
                cells.append(self._cell(spec, sides))
                run.record = dataclasses.replace(run.record, latency=_latency_entry(cells) | sides_entry(sides))
        first = cells[0]
        if first.latency is None:
            raise OutOfMemoryError(first.reason, first.bytes_asked)
        if not first.is_valid:
            raise InvalidMeasurementError(f"latency: {first.reason}")
        run.record = _with_phase_latency(run.record, "prefill_latency_s", first.latency.prefill, reference)
        if first.latency.decode is not None:
            run.record = _with_phase_latency(run.record, "decode_latency_s", first.latency.decode, reference)

    def _cell(self, spec: LatencySpec, sides: Sides) -> CellLatency:
        return measure_cell(
            self.loaded.model,
            spec,
            use_candidate=sides.use_candidate,
            use_baseline=sides.use_baseline,
            progress=lambda done, total: self.on_phase("latency", done, total),
            compiled=self.plan.compiled.get(spec),
        )

    def _energy(self, run: PointRun, meter: EnergyMeter, reference: Reference | None) -> None:
        self.on_phase("energy", 0, 1)
        with run.timed("energy"):
            energy = measure_energy(
                self.loaded.model,
                self.plan.cells[0],
                meter,
                idle=self.plan.idle,
                windows=self.plan.energy_windows,
                precision=self.plan.energy_precision,
            )
        entry = {**_json_safe(energy), "is_valid": energy.is_valid, "reason": energy.reason}
        run.record = dataclasses.replace(run.record, energy=entry)
        if not energy.is_valid and self.required.valid_energy:
            raise InvalidMeasurementError(f"energy: {energy.reason}")
        for name, spread in _energies(energy).items():
            run.record = _with_quantity(
                run.record, name, Interval(spread.mean_j, spread.low_j, spread.high_j), reference
            )

    def _memory(self, run: PointRun, reference: Reference | None) -> None:
        self.on_phase("memory", 0, 1)
        per_token = run.record.cost.get("kv_cache_bytes_per_token")
        with run.timed("memory"):
            memory = measure_peak_memory(self.loaded.model, self.plan.cells[0], kv_cache_bytes_per_token=per_token)
        run.record = dataclasses.replace(run.record, memory=_json_safe(memory))
        run.record = _with_quantity(run.record, "peak_memory_bytes", Interval(float(memory.peak_bytes)), reference)


def _predict_latency(run: PointRun, plan: MeasurementPlan, reference: Reference) -> None:
    """Dense as measured, less what the point's products take less: attention, norms and the rest stay as they are."""
    assert plan.profile is not None  # noqa: S101 - made where the plan predicts
    point = DesignPoint.from_json(run.record.point, plan.profile.topology)
    for name, phase in plan.phases().items():
        dense = reference.record.quantities.get(name)
        if dense is None or dense.value is None:
            continue
        latency = plan.profile.predicted_seconds(point, phase, dense.value)
        run.record = _with_quantity(run.record, name, Interval(latency), reference)
        run.record = dataclasses.replace(run.record, predicted=(*run.record.predicted, name))


def _latency_entry(cells: Sequence[CellLatency]) -> dict[str, Any]:
    """The first cell as it stands, its attempts, and the other cells beside it."""
    first, *others = (_cell_entry(cell) for cell in cells)
    return {**first, "cells": others}


def sides_entry(sides: Sides) -> dict[str, Any]:
    """What the fast form of the point is; nothing in other modes."""
    merged = getattr(sides, "merged", None)
    return {} if merged is None else {"merged": list(merged)}


def _cell_entry(cell: CellLatency) -> dict[str, Any]:
    values = _json_safe(cell)
    return {**(values.pop("latency") or {}), **values, "cell": cell.spec.cell}


def _energies(energy: EnergyResult) -> dict[str, EnergySpread]:
    """Quantity to its spread; phases that are invalid have none."""
    spreads = {
        "prefill_energy_j": energy.prefill.per_sequence,
        "prefill_energy_per_token_j": energy.prefill.per_token,
        "prefill_net_energy_per_token_j": energy.prefill.net_per_token,
    }
    if energy.decode is not None:
        spreads |= {
            "energy_per_token_j": energy.decode.per_token,
            "net_energy_per_token_j": energy.decode.net_per_token,
        }
    return {name: spread for name, spread in spreads.items() if spread is not None}


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


def _with_quantity(record: TrialRecord, name: str, value: Interval, reference: Reference | None) -> TrialRecord:
    quantities, ratios = {**record.quantities, name: value}, dict(record.ratios)
    dense = None if reference is None else reference.record.quantities.get(name)
    if dense is not None and dense.value and value.value is not None:
        ratios[name] = Interval(value.value / dense.value)
    return dataclasses.replace(record, quantities=quantities, ratios=ratios)


def _json_safe(value: Any) -> Any:
    """A frozen result as JSON: nested dataclasses to mappings, what is not finite to None."""
    return finite(dataclasses.asdict(value))
