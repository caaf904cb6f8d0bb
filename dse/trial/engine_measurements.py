"""Measure a trial's point while an engine serves requests: TTFT, TPOT, throughput and energy, for its record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dse.config import MeasurementConfig
from dse.decomposition import AppliedPoint
from dse.decomposition.surgery import FactorSource
from dse.engines import EnginePair, EngineSettings, PairedServing, ResidentServer, Server, engine_named, measure_serving
from dse.errors import ConfigError, InvalidMeasurementError
from dse.evaluation.statistics.intervals import Interval
from dse.measurement import EnergyMeter, IdlePower, LatencySpec, PhaseLatency
from dse.models import LoadedModel
from dse.progress import ProgressCallback
from dse.trial.measurement_plan import MeasurementPlan
from dse.trial.trial_run import TrialRun
from dse.trial_record import EvaluatedTrial, TrialRecord, json_safe

__all__ = ["EngineMeasurer", "engine_key", "engine_pair", "serving_entry", "serving_quantities"]

Quantities = Mapping[str, tuple[Interval, Interval]]
"""Quantity to its value and its ratio to the dense model."""


def engine_pair(config: MeasurementConfig, loaded: LoadedModel, source: FactorSource) -> EnginePair:
    """The engine of a study or a command, not started yet.

    Raises:
        EngineUnavailableError: The engine is not installed in its interpreter.
        ConfigError: The model cannot generate.
    """
    engine = engine_named(config.engine)
    engine.check_available(config.python)
    if not loaded.topology.is_decoder:
        raise ConfigError(
            f"engine '{engine.name}' needs a model that generates, but {loaded.topology.architecture} does not; measure"
            " it with `engine: transformers`"
        )
    settings = EngineSettings(
        python=config.python,
        options=config.options,
        time_limit_s=config.engine_time_limit_s,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if loaded.device.type == "cpu" else 0,
        context_tokens=max(prompt + new for _, prompt, new in config.cells),
    )
    return EnginePair(engine, settings, loaded, source)


@dataclass(frozen=True)
class EngineMeasurer:
    """Measures points while an engine serves requests.

    Attributes:
        loaded: The resident model.
        plan: Cells, requests and meter.
        pair: The engine in its own process; None serves with the resident model.
        on_phase: Progress callback.
    """

    loaded: LoadedModel
    plan: MeasurementPlan
    pair: EnginePair | None
    on_phase: ProgressCallback

    def measure(
        self,
        run: TrialRun,
        applied: AppliedPoint,
        baseline: EvaluatedTrial | None,
        idle: IdlePower | None,
        *,
        energy: bool,
        latencies: bool,
    ) -> None:
        """Measure all cells of the grid; the first one provides the objectives.

        Args:
            run: The trial; its record gets the results.
            applied: The point in the resident model, in place before and after.
            baseline: The dense model's trial; None while it is itself measured.
            idle: Idle power, for net energy.
            energy: Whether energy must be measured and valid.
            latencies: Whether the engine also provides prefill and decode latency.

        Raises:
            InvalidMeasurementError: Timings or a required energy are not valid.
            EngineError: The engine failed, died, hung, or cannot take the point.
        """
        meter = self.plan.meter if energy else None
        with run.timed("serving"):
            measured = self.cells(applied, is_dense=baseline is None, meter=meter, idle=idle)
        first = measured[0]
        run.update(serving=serving_entry(measured))
        if baseline is not None and first.start_up_s:  # the dense model's engine starts before its trial
            run.seconds["engine_start"] = run.seconds.get("engine_start", 0.0) + first.start_up_s
            run.seconds["serving"] -= first.start_up_s
        if not first.is_valid:
            raise InvalidMeasurementError(f"engine '{first.engine}': {first.reason}")
        if energy and first.energy is not None and not first.energy.is_valid:
            raise InvalidMeasurementError(f"energy of engine '{first.engine}': {first.energy.reason}")
        dense = None if baseline is None else baseline.record
        for name, (value, ratio) in serving_quantities(first, dense, latencies=latencies).items():
            run.set_quantity(name, value, ratio)
            if self.pair is not None:
                run.update(engines={**run.record.engines, name: first.engine})

    def cells(
        self,
        applied: AppliedPoint,
        *,
        is_dense: bool,
        meter: EnergyMeter | None,
        idle: IdlePower | None,
        meter_every_cell: bool = False,
    ) -> tuple[PairedServing, ...]:
        """Measure every cell with candidate and baseline in turn, or the baseline alone.

        Args:
            applied: The point in the resident model.
            is_dense: Whether to measure the baseline alone.
            meter: An open energy meter; None measures no energy.
            idle: Idle power, for net energy.
            meter_every_cell: Whether energy is measured in every cell, not in the first one only.
        """
        with self._servers(applied, is_dense=is_dense) as (baseline, candidate):
            return tuple(
                self._cell(spec, baseline, candidate, meter if index == 0 or meter_every_cell else None, idle)
                for index, spec in enumerate(self.plan.cells)
            )

    def _cell(
        self,
        spec: LatencySpec,
        baseline: Server,
        candidate: Server | None,
        meter: EnergyMeter | None,
        idle: IdlePower | None,
    ) -> PairedServing:
        return measure_serving(
            baseline,
            candidate,
            spec,
            requests=self.plan.requests,
            meter=meter,
            idle=idle,
            device=str(self.loaded.device),
            progress=lambda done, total: self.on_phase("serving", done, total),
        )

    @contextlib.contextmanager
    def _servers(self, applied: AppliedPoint, *, is_dense: bool) -> Iterator[tuple[Server, Server | None]]:
        """The servers of the dense model and of the point; the resident model is dense while an engine is used."""
        if self.pair is None:
            model = self.loaded.model
            candidate = None if is_dense else ResidentServer(model, applied.use_candidate)
            yield ResidentServer(model, applied.use_baseline), candidate
            applied.use_candidate()
            return
        applied.use_baseline()
        try:
            session = self.pair.baseline()
            with self.pair.candidate(applied.point) as other:
                yield session, other
        finally:
            applied.use_candidate()


def serving_quantities(
    measured: PairedServing, dense: TrialRecord | Mapping[str, float] | None, *, latencies: bool
) -> Quantities:
    """The quantities of one cell. A value is the ratio to the dense model times the dense model's value in trial 0.

    Args:
        measured: The measurement.
        dense: The dense model's trial or its values; None for the dense model itself, whose ratios are 1.
        latencies: Whether to add prefill and decode latency.

    Raises:
        InvalidMeasurementError: The dense model's value of a quantity is not known.
    """
    found = {"ttft_s": _time("ttft_s", measured.ttft, dense)}
    if measured.tpot is not None:
        found["tpot_s"] = _time("tpot_s", measured.tpot, dense)
    if latencies:
        found["prefill_latency_s"] = _time("prefill_latency_s", measured.prefill, dense)
        if measured.tpot is not None:
            found["decode_latency_s"] = _time("decode_latency_s", measured.tpot, dense)
    found["throughput_tokens_s"] = _throughput(measured, dense)
    return found | _energies(measured, dense)


def _time(name: str, phase: PhaseLatency, dense: TrialRecord | Mapping[str, float] | None) -> tuple[Interval, Interval]:
    if dense is None:
        value, reach = phase.baseline.median_s, phase.baseline.iqr_s / 2
        return Interval(value, max(0.0, value - reach), value + reach), Interval(1.0, 1.0, 1.0)
    return _scaled(name, Interval(phase.ratio, phase.ratio_low, phase.ratio_high), dense)


def _throughput(measured: PairedServing, dense: TrialRecord | Mapping[str, float] | None) -> tuple[Interval, Interval]:
    """Tokens per second: the inverse of the time of all requests."""
    window, tokens = measured.window, measured.work.output_tokens
    if dense is None:
        times = window.baseline
        reach = times.iqr_s / 2
        low, high = tokens / (times.median_s + reach), tokens / max(times.median_s - reach, times.minimum_s)
        return Interval(tokens / times.median_s, low, high), Interval(1.0, 1.0, 1.0)
    inverse = Interval(1 / window.ratio, 1 / window.ratio_high, 1 / window.ratio_low)
    return _scaled("throughput_tokens_s", inverse, dense)


def _energies(measured: PairedServing, dense: TrialRecord | Mapping[str, float] | None) -> Quantities:
    energy = measured.energy
    if energy is None or energy.ratio is None or energy.baseline_request is None:
        return {}
    found = {}
    for name, tokens in (("request_energy_j", 1), ("output_token_energy_j", measured.work.new_tokens)):
        spread = energy.baseline_request
        if dense is None:
            ends = [None if end is None else end / tokens for end in (spread.low_j, spread.high_j)]
            found[name] = Interval(spread.mean_j / tokens, *ends), Interval(1.0, 1.0, 1.0)
        else:
            found[name] = _scaled(name, Interval(energy.ratio.ratio, energy.ratio.low, energy.ratio.high), dense)
    return found


def _scaled(name: str, ratio: Interval, dense: TrialRecord | Mapping[str, float]) -> tuple[Interval, Interval]:
    base = dense.value(name) if isinstance(dense, TrialRecord) else dense.get(name)
    if base is None or ratio.low is None or ratio.high is None:
        raise InvalidMeasurementError(f"'{name}' of the dense model must be known, but it was not measured")
    return Interval(ratio.value * base, ratio.low * base, ratio.high * base), ratio


def serving_entry(cells: Sequence[PairedServing]) -> dict[str, Any]:
    """The first cell's measurement as a JSON mapping, with the other cells as a list."""
    first, *others = (_cell_entry(cell) for cell in cells)
    return {**first, "cells": others}


def _cell_entry(cell: PairedServing) -> dict[str, Any]:
    work = cell.work
    name = f"batch {work.concurrency}, prompt {work.prompt_tokens}, new {work.new_tokens}"
    entry: dict[str, Any] = json_safe(dataclasses.asdict(cell))
    return entry | {"cell": name}


def engine_key(engine: str, quantity: str) -> str:
    """Name of a quantity that was measured in a serving engine after the search: `vllm.tpot_s`."""
    return f"{engine}.{quantity}"
