"""Select the energy meter of a device, or one by name: `auto`, `rapl`, `nvml[:devices]`, `replay:trace.csv`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dse.errors import ConfigError, MeterUnavailableError, did_you_mean
from dse.measurement.meter import EnergyMeter
from dse.measurement.meter_errors import NoMeterError
from dse.measurement.nvml import NvmlMeter
from dse.measurement.rapl import POWERCAP_ROOT, RaplMeter
from dse.measurement.replay import ReplayMeter

__all__ = ["METER_NAMES", "MeterStatus", "find_meters", "meter_kind", "named_meter", "open_meter"]

METER_NAMES = ("auto", "nvml", "rapl", "replay")


@dataclass(frozen=True)
class MeterStatus:
    """One meter that was tried: its source if it is available, otherwise the reason and the remedy."""

    name: str
    available: bool
    source: str
    reason: str
    remedy: str


def find_meters(device: torch.device, *, powercap_root: Path = POWERCAP_ROOT) -> list[MeterStatus]:
    """Try every meter of this kind of device: NVML for a GPU, RAPL for a CPU, none for others."""
    statuses = []
    for name, open_candidate in _candidates([device], powercap_root).items():
        try:
            statuses.append(MeterStatus(name, True, open_candidate().source, "", ""))
        except NoMeterError as error:
            statuses.append(MeterStatus(name, False, "", error.reason, error.remedy))
    return statuses


def open_meter(*devices: torch.device, powercap_root: Path = POWERCAP_ROOT) -> EnergyMeter:
    """Open the meter of `devices`, which hold one model: several GPUs, or the CPU.

    Raises:
        MeterUnavailableError: There is none; the type gives the cause, and the message the remedy.
    """
    candidates = _candidates(devices, powercap_root)
    refusal: MeterUnavailableError = MeterUnavailableError(
        f"energy is measured on CUDA (NVML) and on the CPU (RAPL) only, but got the device '{_names(devices)}'; "
        f"remove energy from the objectives"
    )
    for open_candidate in candidates.values():
        try:
            return open_candidate()
        except NoMeterError as error:
            reason = f"'{_names(devices)}' must have a meter, but {error.reason}"
            refusal = type(error)(error.meter, reason, error.remedy)
    raise refusal


def meter_kind(name: str) -> str:
    """The kind of meter that a name denotes: the part before the colon.

    Raises:
        ConfigError: The kind is unknown, or the part after the colon is missing or not allowed.
    """
    kind, _, rest = name.partition(":")
    if kind not in METER_NAMES:
        raise ConfigError(
            f"a meter must be one of auto, rapl, nvml, nvml:<index or UUID>,..., replay:<trace.csv>, but got '{name}'"
            f"{did_you_mean(kind, METER_NAMES)}"
        )
    if (kind == "replay") != bool(rest) and kind != "nvml":
        rule = "needs a trace to replay: replay:<trace.csv>" if kind == "replay" else "takes nothing after a colon"
        raise ConfigError(f"the meter {kind} {rule}, but got '{name}'")
    return kind


def named_meter(name: str, *devices: torch.device, powercap_root: Path = POWERCAP_ROOT) -> EnergyMeter:
    """Open a meter by name; `auto` selects the meter of `devices`, and `nvml` alone selects their GPUs.

    An explicitly named meter need not cover the model's own device: a replay never does, and `nvml:0` with a model on
    the CPU reads that GPU. The record names what was read.

    Raises:
        ConfigError: There is no such meter, or its trace cannot be read.
        MeterUnavailableError: The meter is not available on this machine.
    """
    kind, rest = meter_kind(name), name.partition(":")[2]
    if kind == "replay":
        return ReplayMeter(Path(rest))
    if kind == "rapl":
        return RaplMeter(powercap_root)
    if kind == "nvml":
        chosen: list[int | str] = [
            int(p) if p.isdigit() else p for p in (part.strip() for part in rest.split(",")) if p
        ]
        return NvmlMeter(chosen or [_cuda_index(device) for device in devices if device.type == "cuda"] or [0])
    return open_meter(*devices, powercap_root=powercap_root)


def _candidates(devices: Sequence[torch.device], powercap_root: Path) -> Mapping[str, Callable[[], EnergyMeter]]:
    """The meters of each kind of device by name, in the order in which they are tried; a new meter is one line here."""
    by_device: dict[str, dict[str, Callable[[], EnergyMeter]]] = {
        "cuda": {NvmlMeter.name: lambda: NvmlMeter([_cuda_index(device) for device in devices])},
        "cpu": {RaplMeter.name: lambda: RaplMeter(powercap_root)},
    }
    kinds = {device.type for device in devices}
    return by_device.get(kinds.pop(), {}) if len(kinds) == 1 else {}


def _cuda_index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


def _names(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, devices))
