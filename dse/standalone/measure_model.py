"""Measure latency, energy and memory of a model at a design point, compared with the dense model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dse.cost import point_cost
from dse.decomposition import AppliedPoint, apply_point
from dse.design_point import DesignPoint
from dse.engines import engine_named
from dse.errors import ConfigError, MeterUnavailableError, OutOfMemoryError, TrialError
from dse.measurement import (
    EnergyMeter,
    IdlePower,
    LatencySpec,
    check_workload,
    device_lock,
    grid_of,
    measure_cell,
    measure_idle_power,
    measure_paired_energy,
    measure_peak_memory,
    meter_kind,
    named_meter,
)
from dse.models import LoadedModel
from dse.models.device_map import spread_over
from dse.models.load import AUTO_DTYPE, default_dtype
from dse.standalone.measure_engine import EngineRequest, measure_in_engine
from dse.standalone.model_request import CalibrationText, ModelRequest, point_factors
from dse.study import StudyListener, resolve_device
from dse.trial.energy_quantities import paired_energy_entry
from dse.trial_record import json_safe
from dse.workers.device_defaults import settled_mode

__all__ = ["MeasurementRequest", "measure_model"]


@dataclasses.dataclass(frozen=True)
class MeasurementRequest:
    """The workloads to measure and how to measure them.

    Attributes:
        spec: Mode, ABBA blocks, precision, time limit and seed; its sizes are replaced by those of each workload.
        prompt_tokens: Prompt lengths in tokens.
        new_tokens: Numbers of tokens to decode.
        is_auto_mode: Whether the device decides the mode, instead of `spec`.
        meter: auto, rapl, nvml, nvml:<index or UUID>,..., replay:<trace.csv>, or none.
        engine: The serving engine to measure in; None measures with the model in this process.
    """

    spec: LatencySpec
    batch_sizes: Sequence[int] = (1,)
    prompt_tokens: Sequence[int] = (128,)
    new_tokens: Sequence[int] = (16,)
    meter: str = "auto"
    engine: EngineRequest | None = None
    is_auto_mode: bool = False


def measure_model(
    model: ModelRequest,
    point: str,
    request: MeasurementRequest,
    *,
    calibration: CalibrationText | None = None,
    listener: StudyListener | None = None,
) -> dict[str, Any]:
    """Measure every combination of batch size, prompt length and number of new tokens.

    A combination that does not fit on the device is reported with its reason.

    Args:
        model: The model; `device` may list several GPUs, such as `cuda:0,cuda:1`.
        point: JSON text, a JSON file, or "dense".
        calibration: Text for calibrated methods; None means the default text.

    Returns:
        The measurements as a JSON document.

    Raises:
        UserError: The model, point, mode, meter or a workload is not valid.
    """
    watcher = listener or StudyListener()
    if request.meter != "none":
        meter_kind(request.meter)
    cells = grid_of(
        request.spec, list(itertools.product(request.batch_sizes, request.prompt_tokens, request.new_tokens))
    )
    devices = _devices(model.device)
    if request.engine is not None:
        engine_named(request.engine.engine).check_available(request.engine.python)
    if request.engine is not None and len(devices) > 1:
        raise ConfigError(
            f"an engine shards a model by its own options, such as tensor_parallel_size, but got '{model.device}'; name"
            " one device"
        )
    meter, no_meter = _meter(request.meter, devices)
    if len(devices) > 1 and model.dtype == AUTO_DTYPE:  # loaded on the CPU first, where it would mean float32
        dtype = default_dtype(model.ref, devices[0], revision=model.revision, trust_remote_code=model.trust_remote_code)
        model = dataclasses.replace(model, dtype=dtype)
    loaded = model.load(watcher, device=str(devices[0]) if len(devices) == 1 else "cpu")
    if len(devices) > 1:
        spread_over(loaded.model, devices)
    found = DesignPoint.read(point, loaded.topology)
    if request.is_auto_mode and len(devices) == 1 and request.engine is None:
        mode, reason = settled_mode(loaded, cells[0])
        cells = tuple(dataclasses.replace(cell, mode=mode) for cell in cells)
        if reason:
            watcher.on_message(f"mode {mode}: {reason}")
    for cell in cells:
        check_workload(loaded.model, cell)
    bank = point_factors(loaded, found, calibration or CalibrationText(), watcher)
    if request.engine is not None:
        served, idle = measure_in_engine(
            loaded, found, bank, request.engine, cells, meter=meter, progress=watcher.on_phase
        )
        return _document(model, loaded, found, devices, request, cells[0].mode, meter, no_meter, idle) | {
            "cells": served
        }
    applied = apply_point(loaded.model, loaded.topology, found, bank)
    try:
        with device_lock(*devices):
            idle = None if meter is None else measure_idle_power(meter)
            measured = [_Cell(loaded, found, applied, cell, meter, idle, watcher).measure() for cell in cells]
    finally:
        applied.undo()
    return _document(model, loaded, found, devices, request, cells[0].mode, meter, no_meter, idle) | {"cells": measured}


def _document(
    model: ModelRequest,
    loaded: LoadedModel,
    found: DesignPoint,
    devices: Sequence[torch.device],
    request: MeasurementRequest,
    mode: str,
    meter: EnergyMeter | None,
    no_meter: str | None,
    idle: IdlePower | None,
) -> dict[str, Any]:
    """What was measured and how, without the cells."""
    return {
        "model": model.ref,
        "point_id": found.id,
        "point": found.to_json(),
        "is_dense": found.is_dense,
        "reduction": point_cost(loaded.topology, found).reduction,
        "device": "+".join(map(str, devices)),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "mode": mode,
        "engine": "transformers" if request.engine is None else request.engine.engine,
        "meter": None if meter is None else {"name": meter.name, "source": meter.source, "is_replay": meter.is_replay},
        "no_meter": no_meter,
        "idle_power": None if idle is None else json_safe(dataclasses.asdict(idle)),
    }


def _devices(names: str) -> list[torch.device]:
    """One device, or several GPUs from `cuda:0,cuda:1`."""
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if len(devices) > 1 and (len(set(devices)) < len(devices) or any(d.type != "cuda" for d in devices)):
        raise ConfigError(f"several devices must be different GPUs, such as cuda:0,cuda:1, but got '{names}'")
    visible = torch.cuda.device_count()
    if len(devices) > 1 and any((device.index or 0) >= visible for device in devices):
        raise ConfigError(f"`--device {names}` must be GPUs that torch sees, but it sees {visible}")
    return devices


def _meter(name: str, devices: Sequence[torch.device]) -> tuple[EnergyMeter | None, str | None]:
    """The meter, or the reason why there is none. A missing meter is an error only if it was named explicitly."""
    if name == "none":
        return None, "not requested"
    try:
        return named_meter(name, *devices), None
    except MeterUnavailableError as error:
        if name != "auto":
            raise
        return None, str(error)


@dataclasses.dataclass(frozen=True)
class _Cell:
    loaded: LoadedModel
    point: DesignPoint
    applied: AppliedPoint
    spec: LatencySpec
    meter: EnergyMeter | None
    idle: IdlePower | None
    listener: StudyListener

    def measure(self) -> dict[str, Any]:
        """Latency in alternation; then energy and memory of the dense model and of the point in turn."""
        self.listener.on_message(f"measuring {self.spec.cell}")
        latency = measure_cell(
            self.loaded.model,
            self.spec,
            self.applied,
            progress=lambda done, total: self.listener.on_phase("latency", done, total),
        )
        document: dict[str, Any] = {
            "batch_size": self.spec.batch_size,
            "prompt_tokens": self.spec.prompt_tokens,
            "new_tokens": self.spec.new_tokens,
            "latency": json_safe(dataclasses.asdict(latency)),
        }
        if latency.latency is not None:
            document |= {"energy": self._energy(), "memory": self._both(self._memory)}
        return document

    def _both(self, measure: Callable[[DesignPoint], dict[str, Any] | None]) -> dict[str, Any]:
        found = {}
        for side, use, point in (
            ("dense", self.applied.use_baseline, DesignPoint.dense()),
            ("point", self.applied.use_candidate, self.point),
        ):
            use()
            try:
                found[side] = measure(point)
            except TrialError as error:
                asked = error.bytes_asked if isinstance(error, OutOfMemoryError) else None
                found[side] = {"is_valid": False, "reason": str(error), "bytes_asked": asked}
        return found

    def _energy(self) -> dict[str, Any]:
        """Both sides in alternating windows, with their ratio."""
        if self.meter is None:
            return {"dense": None, "point": None, "ratios": None}
        self.listener.on_phase("energy", 0, 1)
        try:
            energy = measure_paired_energy(self.loaded.model, self.spec, self.meter, self.applied, idle=self.idle)
        except TrialError as error:
            asked = error.bytes_asked if isinstance(error, OutOfMemoryError) else None
            failed = {"is_valid": False, "reason": str(error), "bytes_asked": asked}
            return {"dense": failed, "point": failed, "ratios": None}
        sides = {"dense": energy.baseline, "point": energy.candidate}
        found: dict[str, Any] = {
            side: {**json_safe(dataclasses.asdict(one)), "is_valid": one.is_valid, "reason": one.reason}
            for side, one in sides.items()
        }
        return {**found, "ratios": paired_energy_entry(energy)["ratios"]}

    def _memory(self, point: DesignPoint) -> dict[str, Any]:
        self.listener.on_phase("memory", 0, 1)
        per_token = point_cost(self.loaded.topology, point).kv_cache_bytes_per_token
        memory = measure_peak_memory(self.loaded.model, self.spec, kv_cache_bytes_per_token=per_token)
        values: dict[str, Any] = json_safe(dataclasses.asdict(memory))
        return {**values, "is_valid": True, "reason": ""}
