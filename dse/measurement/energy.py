"""Find the meter that counts for a device, and measure the energy of prefill and decode with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dse.errors import InvalidMeasurementError, MeterUnavailableError
from dse.measurement.energy_window import EnergyMeter, EnergyWindow, NoMeterError
from dse.measurement.nvml import NvmlMeter
from dse.measurement.out_of_memory import out_of_memory_errors
from dse.measurement.rapl import POWERCAP_ROOT, RaplMeter
from dse.measurement.workload import LatencySpec, Workload

__all__ = [
    "EnergyMeter",
    "EnergyResult",
    "EnergyWindow",
    "MeterStatus",
    "PhaseEnergy",
    "find_meters",
    "measure_energy",
    "open_meter",
]


@dataclass(frozen=True)
class MeterStatus:
    """One meter that was tried: its source where it is available, else why not and what to do."""

    name: str
    available: bool
    source: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class PhaseEnergy:
    """Gross energy of one phase, repeated within one window.

    Attributes:
        gross_j: Joules of the whole window, idle power included; None when invalid.
        per_device_j: The same, device by device; empty when invalid.
        duration_s: Length of the window.
        repeats: Batches run in it.
        updates: Refreshes of the meter seen in it, a lower bound.
        is_valid: Whether the energy can be trusted.
        reason: Why not; empty when valid.
    """

    gross_j: float | None
    per_device_j: Mapping[str, float]
    duration_s: float
    repeats: int
    updates: int
    is_valid: bool
    reason: str


@dataclass(frozen=True)
class EnergyResult:
    """Energy of prefill and decode, and how it was taken. Reading a figure of an invalid phase raises.

    Attributes:
        prefill: The window of prefill.
        decode: The window of decode; None for encoders.
        meter: Kind of meter, "nvml" or "rapl".
        source: What it reads.
        details: Driver version, device names.
        spec: Lengths and batch.
    """

    prefill: PhaseEnergy
    decode: PhaseEnergy | None
    meter: str
    source: str
    details: Mapping[str, str]
    spec: LatencySpec

    @property
    def is_valid(self) -> bool:
        """Whether every phase can be trusted."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why not; empty when valid."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        return "; ".join(f"{name}: {phase.reason}" for name, phase in phases.items() if phase and not phase.is_valid)

    @property
    def prefill_energy_j(self) -> float:
        """Joules per prompt (one sequence of the batch).

        Raises:
            InvalidMeasurementError: The window was invalid; the message holds the reason.
        """
        return _gross_j("prefill", self.prefill) / (self.prefill.repeats * self.spec.batch_size)

    @property
    def energy_per_token_j(self) -> float | None:
        """Joules per decoded token of one sequence; None for encoders.

        Raises:
            InvalidMeasurementError: The window was invalid; the message holds the reason.
        """
        if self.decode is None:
            return None
        tokens = self.decode.repeats * self.spec.batch_size * self.spec.new_tokens
        return _gross_j("decode", self.decode) / tokens


def find_meters(device: torch.device, *, powercap_root: Path = POWERCAP_ROOT) -> list[MeterStatus]:
    """Try every meter that counts for `device`: NVML for a GPU, RAPL for a CPU; nothing else measures its work."""
    candidates = _candidates(device, powercap_root)
    statuses = []
    for name, open_candidate in candidates.items():
        try:
            statuses.append(MeterStatus(name, True, open_candidate().source, "", ""))
        except NoMeterError as error:
            statuses.append(MeterStatus(name, False, "", error.reason, error.remedy))
    return statuses


def open_meter(device: torch.device, *, powercap_root: Path = POWERCAP_ROOT) -> EnergyMeter:
    """The meter of `device`.

    Raises:
        MeterUnavailableError: There is none; the message names what was tried and the remedy.
    """
    refusals = []
    for open_candidate in _candidates(device, powercap_root).values():
        try:
            return open_candidate()
        except NoMeterError as error:
            refusals.append(str(error))
    if not refusals:
        raise MeterUnavailableError(
            f"energy is measured on CUDA (NVML) and on the CPU (RAPL) only, but got the device '{device}'; "
            f"leave energy out of the objectives"
        )
    raise MeterUnavailableError(f"energy on '{device}' must have a meter, but {'; '.join(refusals)}")


def measure_energy(
    model: nn.Module, spec: LatencySpec, meter: EnergyMeter, *, min_window_s: float = 0.5, max_window_s: float = 60.0
) -> EnergyResult:
    """Measure the energy of prefill and of decode, each in a window that repeats the work until the meter is precise.

    A window ends when it lasts `min_window_s` and the meter has refreshed `meter.min_updates` times, or after
    `max_window_s`; one that is too short, or in which the meter failed, is invalid and carries the reason.

    Args:
        model: Resident Hugging Face model in eval mode, on the device of `meter`.
        spec: Lengths, batch and seed; its blocks are not used.
        meter: An open meter.
        min_window_s: Shortest window in seconds.
        max_window_s: Time limit of a window in seconds; a repeat that has begun is finished.

    Raises:
        ConfigError: The prompt does not fit the model's context.
        OutOfMemoryError: The device has no room.
    """
    with out_of_memory_errors("measuring energy"):
        workload = Workload(model, spec)
        state = workload.prefill()  # also warms up
        prefill = _repeat(meter, workload, workload.prefill, min_window_s, max_window_s)
        decode = None
        if workload.decodes:
            workload.decode_again(state)
            decode = _repeat(meter, workload, lambda: workload.decode_again(state), min_window_s, max_window_s)
    return EnergyResult(prefill, decode, meter.name, meter.source, dict(meter.details), spec)


def _repeat(
    meter: EnergyMeter, workload: Workload, work: Callable[[], object], min_window_s: float, max_window_s: float
) -> PhaseEnergy:
    repeats = 0
    with meter.window() as window:
        while True:
            work()
            workload.synchronize()
            repeats += 1
            elapsed_s = window.elapsed_s
            is_long_enough = elapsed_s >= min_window_s and window.updates >= meter.min_updates
            if is_long_enough or window.is_faulty or elapsed_s >= max_window_s:
                break
    reason = window.reason
    per_device_j = {} if reason else window.per_device_j
    gross_j = None if reason else sum(per_device_j.values())
    return PhaseEnergy(gross_j, per_device_j, window.duration_s, repeats, window.updates, not reason, reason)


def _gross_j(name: str, phase: PhaseEnergy) -> float:
    if phase.gross_j is None:
        raise InvalidMeasurementError(f"the energy of {name} must be valid to be used, but {phase.reason}")
    return phase.gross_j


def _candidates(device: torch.device, powercap_root: Path) -> dict[str, Callable[[], EnergyMeter]]:
    """The meters that count for a kind of device, by name, in the order tried: a new meter is one line here."""
    by_device: dict[str, dict[str, Callable[[], EnergyMeter]]] = {
        "cuda": {NvmlMeter.name: lambda: NvmlMeter([_cuda_index(device)])},
        "cpu": {RaplMeter.name: lambda: RaplMeter(powercap_root)},
    }
    return by_device.get(device.type, {})


def _cuda_index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0
