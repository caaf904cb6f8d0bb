"""How a study measures, resolved: the cells of its grid, its meter, and the power at rest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from dse.config import StudyConfig
from dse.decomposition import AppliedPoint
from dse.design_point import DesignPoint
from dse.errors import ConfigError, MeterUnavailableError
from dse.expert_tensor import EXPERT_ROLES
from dse.measurement import (
    EnergyMeter,
    IdlePower,
    LatencySpec,
    Workload,
    device_lock,
    grid_of,
    measure_idle_power,
    meter_kind,
    named_meter,
)
from dse.measurement.device_profile import model_profile
from dse.measurement.device_profile.model_profile import ModelProfile, Phase
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.runtime import FastRuntime, GenerationShape, Sides, fast_runtime, timings_for
from dse.search.spaces.base import SearchSpace

__all__ = ["MeasurementPlan", "open_study_meter"]


@dataclass
class MeasurementPlan:
    """How the trials of a study are measured.

    Attributes:
        cells: The grid; the first cell is the one that the objectives are read from.
        meter: The energy meter; None where there is none or energy is not asked for.
        energy_windows: Windows a phase.
        energy_precision: Relative error asked of a window; None for the meter's own.
        idle: Power at rest, as of the last time it was taken.
        runtime: Puts both sides into their fast forms; None where the mode runs them as they are.
        profile: The model's products on this device; None where nothing asks for it.
        predicts_latency: Whether the latency of points is predicted from it.
        kept: What of a point the study takes: all of it, or what the profile calls faster.
        compiled: Cell to what was compiled for the dense model, whose modules in the fast form stay the same from trial
            to trial; empty in other modes, where every trial compiles its own.
    """

    cells: tuple[LatencySpec, ...]
    meter: EnergyMeter | None = None
    energy_windows: int = 3
    energy_precision: float | None = None
    idle: IdlePower | None = None
    runtime: FastRuntime | None = None
    profile: ModelProfile | None = None
    predicts_latency: bool = False
    kept: Callable[[DesignPoint], DesignPoint] = lambda point: point
    compiled: dict[LatencySpec, Workload] = field(default_factory=dict)

    @classmethod
    def of(cls, config: StudyConfig, meter: EnergyMeter | None) -> MeasurementPlan:
        """The plan of a study file."""
        settings = config.measurement
        first = LatencySpec(
            mode=settings.mode,
            blocks=settings.blocks,
            warmup_blocks=settings.warmup_blocks,
            max_warmup_blocks=max(settings.max_warmup_blocks, settings.warmup_blocks),
            warmup_tolerance=settings.warmup_tolerance,
            min_duration_s=settings.min_duration_s,
            max_duration_s=settings.max_duration_s,
            precision=settings.precision,
        )
        return cls(grid_of(first, settings.cells), meter, settings.energy_windows, settings.energy_precision)

    def phases(self) -> dict[str, Phase]:
        """The phases of the objectives' cell, by the quantity that is their latency."""
        first = self.cells[0]
        return {
            f"{name}_latency_s": Phase.of(name, first.batch_size, first.prompt_tokens) for name in ("prefill", "decode")
        }

    def use_runtime(
        self, loaded: LoadedModel, objectives: Collection[str], progress: ProgressCallback = ignore_progress
    ) -> None:
        """Have models put into the form that is fastest in the phases of the latency objectives, in mode `fast`."""
        first = self.cells[0]
        if first.mode != "fast":
            return
        counts = [name for name in self.phases() if name in objectives] or list(self.phases())
        generation = GenerationShape(
            first.batch_size,
            first.prompt_tokens if "prefill_latency_s" in counts else 0,
            first.new_tokens if "decode_latency_s" in counts else 0,
        )
        self.runtime = fast_runtime(loaded.model, generation, progress)
        self.compiled = {cell: Workload(loaded.model, cell) for cell in self.cells}

    def use_profile(self, loaded: LoadedModel, space: SearchSpace, config: StudyConfig) -> None:
        """Let the device profile decide what the study asks it for.

        Raises:
            ConfigError: Nothing that the space may decompose is faster than dense.
        """
        settings = config.measurement
        if not (settings.only_if_faster or settings.predict_latency):
            return
        if experts := [role for role in space.roles if role in EXPERT_ROLES]:
            raise ConfigError(
                "`measurement.only_if_faster` and `predict_latency` must go with matrices alone, whose products are"
                f" timed, but space '{space.config.name}' names '{experts[0]}'; switch them off or leave the role out"
            )
        self.profile = profile = model_profile(loaded, timings_for(loaded.model))
        self.predicts_latency = settings.predict_latency
        if settings.only_if_faster:
            names = {entry.name for entry in config.objectives}
            phases = [phase for name, phase in self.phases().items() if name in names]
            phases = phases or [self.phases()["decode_latency_s"]]
            self.kept = lambda point: profile.only_faster(point, phases)
            with device_lock(loaded.device):
                plain = [self.kept(space.point(levels)) for levels in space.ladder()]
            if plain and all(point.is_dense for point in plain):
                raise ConfigError(
                    "`measurement.only_if_faster` needs something that is faster decomposed, but the device profile"
                    " calls nothing of this space faster; see `dse profile-device`, or lower the ranks"
                )

    def sides(self, applied: AppliedPoint) -> AbstractContextManager[Sides]:
        """What swaps a point and the dense model while they are measured."""
        return nullcontext(applied) if self.runtime is None else self.runtime.sides(applied)

    def take_idle_power(self, device: torch.device) -> IdlePower | None:
        """Measure the power at rest and keep it for the trials that follow; None without a meter."""
        if self.meter is None:
            return None
        with device_lock(device):
            self.idle = measure_idle_power(self.meter)
        return self.idle


def open_study_meter(config: StudyConfig, device: torch.device) -> tuple[EnergyMeter | None, str | None]:
    """The study's meter, or why there is none; (None, None) where energy is not asked for.

    Raises:
        ConfigError: The meter that the study names is none, or its trace cannot be read.
        MeterUnavailableError: The study names a meter outright, and it is not here.
    """
    name = config.measurement.meter
    if name is not None:
        try:
            meter_kind(name)
        except ConfigError as error:
            raise ConfigError(f"`measurement.meter`: {error}") from error
    if name is None and not any("energy" in entry.name for entry in config.objectives):
        return None, None
    try:
        return named_meter(name or "auto", device), None
    except MeterUnavailableError as error:
        if name not in (None, "auto"):
            raise
        return None, str(error)
