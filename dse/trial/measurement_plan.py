"""How the trials of a study are measured: grid cells, energy meter, device profile."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from dse.config import StudyConfig
from dse.design_point import DesignPoint
from dse.errors import ConfigError, MeterUnavailableError
from dse.expert_tensor import EXPERT_ROLES
from dse.measurement import (
    EnergyMeter,
    IdlePower,
    LatencySpec,
    device_lock,
    grid_of,
    measure_idle_power,
    meter_kind,
    named_meter,
)
from dse.measurement.device_profile import ModelProfile, Phase, ProductTimings, profile_model, timings_for
from dse.models import LoadedModel
from dse.search.spaces.base import SearchSpace

__all__ = ["MeasurementPlan", "open_study_meter"]


@dataclass(frozen=True)
class MeasurementPlan:
    """How the trials of a study are measured.

    Attributes:
        cells: The grid; the objectives are read from the first cell.
        meter: The energy meter; None if absent or if energy is not required.
        energy_windows: Windows per phase.
        energy_precision: Relative error asked of a window; None for the meter's default.
        profile: The device profile of the model; None if the study does not use one.
        predicts_latency: Whether the latency of points is predicted from the device profile.
        requests: Requests that an engine serves in one turn; None for one for each place in the batch.
        must_be_faster_in: Phases in which a decomposed tensor must be faster than dense; empty accepts every tensor.
    """

    cells: tuple[LatencySpec, ...]
    meter: EnergyMeter | None = None
    energy_windows: int = 3
    energy_precision: float | None = None
    profile: ModelProfile | None = None
    predicts_latency: bool = False
    must_be_faster_in: tuple[Phase, ...] = ()
    requests: int | None = None

    @classmethod
    def of(cls, config: StudyConfig, meter: EnergyMeter | None) -> MeasurementPlan:
        """The plan of a study file, without a device profile."""
        settings = config.measurement
        first = LatencySpec(
            mode="eager" if settings.mode == "auto" else settings.mode,
            blocks=settings.blocks,
            warmup_blocks=settings.warmup_blocks,
            max_warmup_blocks=max(settings.max_warmup_blocks, settings.warmup_blocks),
            warmup_tolerance=settings.warmup_tolerance,
            min_duration_s=settings.min_duration_s,
            max_duration_s=settings.max_duration_s,
            precision=settings.precision,
        )
        return cls(
            grid_of(first, settings.cells),
            meter,
            settings.energy_windows,
            settings.energy_precision,
            requests=settings.requests,
        )

    def phases(self) -> dict[str, Phase]:
        """Latency quantity to its phase in the objectives' cell."""
        first = self.cells[0]
        return {
            f"{name}_latency_s": Phase.of(name, first.batch_size, first.prompt_tokens) for name in ("prefill", "decode")
        }

    def with_profile(
        self, loaded: LoadedModel, space: SearchSpace, config: StudyConfig, timings: ProductTimings | None = None
    ) -> MeasurementPlan:
        """The plan with a device profile, if the study asks for one.

        Args:
            loaded: The dense model.
            space: The search space.
            config: The study.
            timings: Product timings of a serving engine; None times products in this process.

        Raises:
            ConfigError: The space has fused experts, which the profile does not cover, or nothing in the space is
                faster when decomposed.
        """
        settings = config.measurement
        if not (settings.only_if_faster or settings.predict_latency):
            return self
        if experts := [role for role in space.roles if role in EXPERT_ROLES]:
            raise ConfigError(
                "`measurement.only_if_faster` and `predict_latency` cover matrices only, but space"
                f" '{space.config.name}' names '{experts[0]}'; switch them off or leave the role out"
            )
        phases: tuple[Phase, ...] = ()
        if settings.only_if_faster:
            names = {entry.name for entry in config.objectives}
            phases = tuple(phase for name, phase in self.phases().items() if name in names)
            phases = phases or (self.phases()["decode_latency_s"],)
        plan = dataclasses.replace(
            self,
            profile=profile_model(loaded, timings or timings_for(loaded.model)),
            predicts_latency=settings.predict_latency,
            must_be_faster_in=phases,
        )
        plan._check_something_is_faster(loaded, space)
        return plan

    def faster_part(self, point: DesignPoint) -> DesignPoint:
        """The point without decomposed tensors that the device profile finds slower than dense."""
        if self.profile is None or not self.must_be_faster_in:
            return point
        return self.profile.only_faster(point, self.must_be_faster_in)

    def _check_something_is_faster(self, loaded: LoadedModel, space: SearchSpace) -> None:
        if not self.must_be_faster_in:
            return
        with device_lock(loaded.device):
            points = [self.faster_part(space.point(levels)) for levels in space.uniform_points()]
        if points and all(point.is_dense for point in points):
            raise ConfigError(
                "`measurement.only_if_faster` needs a tensor that is faster when decomposed, but the device profile"
                " finds none in this space; see `dse profile-device`, or lower the ranks"
            )

    def measure_idle(self, device: torch.device) -> IdlePower | None:
        """Measure the device's idle power; None without a meter."""
        if self.meter is None:
            return None
        with device_lock(device):
            return measure_idle_power(self.meter)


def open_study_meter(config: StudyConfig, device: torch.device) -> tuple[EnergyMeter | None, str | None]:
    """The study's energy meter, or the reason why there is none; (None, None) if energy is not required.

    Raises:
        ConfigError: The study names an unknown meter, or its trace cannot be read.
        MeterUnavailableError: The study names a meter explicitly, and it is unavailable.
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
