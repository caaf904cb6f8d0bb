"""`dse measure`: latency, energy and memory of a point beside the dense model; no study needed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dse.cli.evaluate import bank_of_point
from dse.cost import cost
from dse.decomposition import apply_point
from dse.design_point import DesignPoint
from dse.errors import ConfigError, MeterUnavailableError, OutOfMemoryError, TrialError
from dse.measurement import (
    EnergyMeter,
    IdlePower,
    LatencySpec,
    check_workload,
    device_lock,
    grid_of,
    measure_cell,
    measure_energy,
    measure_idle_power,
    measure_peak_memory,
    meter_kind,
    named_meter,
)
from dse.models import LoadedModel, load_model
from dse.models.several_devices import spread_over
from dse.runtime import GenerationShape, Sides, fast_runtime
from dse.study import StudyListener, resolve_device
from dse.trial_record import finite

__all__ = ["measure_command"]


def measure_command(options: argparse.Namespace, listener: StudyListener) -> dict[str, Any]:
    """Measure every cell of the grid; one that does not fit is told with its reason.

    Raises:
        UserError: Model, point, mode, meter or grid cannot be had.
    """
    if options.meter != "none":
        meter_kind(options.meter)
    spec = LatencySpec(
        mode=options.mode,
        blocks=options.blocks,
        precision=options.precision,
        max_duration_s=options.max_seconds,
        seed=options.seed,
    )
    cells = grid_of(spec, list(itertools.product(options.batch, options.prompt, options.new)))
    devices = _devices(options.device)
    meter, no_meter = _meter(options.meter, devices)
    listener.on_message(f"loading {options.model}")
    loaded = load_model(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=str(devices[0]) if len(devices) == 1 else "cpu",
        trust_remote_code=options.trust_remote_code,
    )
    if len(devices) > 1:
        spread_over(loaded.model, devices)
    point = DesignPoint.read(options.point, loaded.topology)
    for cell in cells:
        check_workload(loaded.model, cell)
    bank = bank_of_point(loaded, point, options, listener)
    applied = apply_point(loaded.model, loaded.topology, point, bank)
    try:
        with device_lock(*devices):
            idle = None if meter is None else measure_idle_power(meter)
            measured = []
            for cell in cells:
                runtime = None
                if cell.mode == "fast":
                    runtime = fast_runtime(loaded.model, _generation(cell), listener.on_phase)
                with nullcontext(applied) if runtime is None else runtime.sides(applied) as sides:
                    measured.append(_Cell(loaded, point, sides, cell, meter, idle, listener).measure())
    finally:
        applied.undo()
    return {
        "model": options.model,
        "point_id": point.id,
        "point": point.to_json(),
        "is_dense": point.is_dense,
        "reduction": cost(loaded.topology, point).reduction,
        "device": "+".join(map(str, devices)),
        "dtype": options.dtype,
        "mode": options.mode,
        "meter": None if meter is None else {"name": meter.name, "source": meter.source, "is_replay": meter.is_replay},
        "no_meter": no_meter,
        "idle_power": None if idle is None else finite(dataclasses.asdict(idle)),
        "cells": measured,
    }


def _generation(cell: LatencySpec) -> GenerationShape:
    return GenerationShape(cell.batch_size, cell.prompt_tokens, cell.new_tokens)


def _devices(names: str) -> list[torch.device]:
    """One device, or several GPUs: `cuda:0,cuda:1`.

    Raises:
        ConfigError: One is none, is named twice, or is no GPU where there are several.
    """
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if len(devices) > 1 and (len(set(devices)) < len(devices) or any(d.type != "cuda" for d in devices)):
        raise ConfigError(f"several devices must be different GPUs, as cuda:0,cuda:1, but got '{names}'")
    visible = torch.cuda.device_count()
    if len(devices) > 1 and any((device.index or 0) >= visible for device in devices):
        raise ConfigError(f"`--device {names}` must be GPUs that torch sees, but it sees {visible}")
    return devices


def _meter(name: str, devices: Sequence[torch.device]) -> tuple[EnergyMeter | None, str | None]:
    """The meter, or why there is none; only one that was named outright must be here."""
    if name == "none":
        return None, "not asked for"
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
    sides: Sides
    spec: LatencySpec
    meter: EnergyMeter | None
    idle: IdlePower | None
    listener: StudyListener

    def measure(self) -> dict[str, Any]:
        """Latency paired; energy and memory of the dense model and of the point, one after the other."""
        self.listener.on_message(f"measuring {self.spec.cell}")
        latency = measure_cell(
            self.loaded.model,
            self.spec,
            use_candidate=self.sides.use_candidate,
            use_baseline=self.sides.use_baseline,
            progress=lambda done, total: self.listener.on_phase("latency", done, total),
        )
        document: dict[str, Any] = {
            "batch_size": self.spec.batch_size,
            "prompt_tokens": self.spec.prompt_tokens,
            "new_tokens": self.spec.new_tokens,
            "latency": finite(dataclasses.asdict(latency)),
        }
        if latency.latency is not None:
            document |= {"energy": self._both(self._energy), "memory": self._both(self._memory)}
        return document

    def _both(self, measure: Callable[[DesignPoint], dict[str, Any] | None]) -> dict[str, Any]:
        found = {}
        for side, use, point in (
            ("dense", self.sides.use_baseline, DesignPoint.dense()),
            ("point", self.sides.use_candidate, self.point),
        ):
            use()
            try:
                found[side] = measure(point)
            except TrialError as error:
                asked = error.bytes_asked if isinstance(error, OutOfMemoryError) else None
                found[side] = {"is_valid": False, "reason": str(error), "bytes_asked": asked}
        return found

    def _energy(self, _point: DesignPoint) -> dict[str, Any] | None:
        if self.meter is None:
            return None
        self.listener.on_phase("energy", 0, 1)
        energy = measure_energy(self.loaded.model, self.spec, self.meter, idle=self.idle)
        values: dict[str, Any] = finite(dataclasses.asdict(energy))
        return {**values, "is_valid": energy.is_valid, "reason": energy.reason}

    def _memory(self, point: DesignPoint) -> dict[str, Any]:
        self.listener.on_phase("memory", 0, 1)
        per_token = cost(self.loaded.topology, point).kv_cache_bytes_per_token
        memory = measure_peak_memory(self.loaded.model, self.spec, kv_cache_bytes_per_token=per_token)
        values: dict[str, Any] = finite(dataclasses.asdict(memory))
        return {**values, "is_valid": True, "reason": ""}
