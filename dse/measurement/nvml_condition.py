"""Condition of an NVIDIA GPU: temperature, clocks, clock limits, and other processes that compute on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from dse.measurement.meter import DeviceCondition

__all__ = ["condition_of"]

# Bits of NVML's clock event reasons (nvml.h, nvmlClocksEventReason*). "Idle" is omitted: it limits nothing.
_CLOCK_LIMITS = {
    0x002: "application_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
_THROTTLING = {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}


def condition_of(handle: Any, device: str) -> DeviceCondition:
    """The current condition of a GPU. Values that it does not report are None; a failed query is no error.

    Args:
        handle: NVML's handle of the GPU.
        device: Its name in records.
    """
    limits = _clock_limits(handle)
    return DeviceCondition(
        device=device,
        temperature_celsius=_queried(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        core_clock_mhz=_queried(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        memory_clock_mhz=_queried(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        clock_limits=limits,
        throttled_by=tuple(name for name in limits if name in _THROTTLING),
        other_processes=_other_processes(handle),
    )


def _clock_limits(handle: Any) -> tuple[str, ...]:
    bits = _queried(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    if bits is None:  # drivers before 535 use the old name
        bits = _queried(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return tuple(name for bit, name in _CLOCK_LIMITS.items() if int(bits or 0) & bit)


def _other_processes(handle: Any) -> tuple[int, ...]:
    """Ids of other processes.

    In a container the driver lists process ids of the host, which do not include this process's own id. If this process
    uses CUDA and its id is not listed, one of the listed ids is its own; the last one is assumed to be.
    """
    try:
        pids = sorted(int(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except pynvml.NVMLError:
        return ()
    others = [pid for pid in pids if pid != os.getpid()]
    if len(others) == len(pids) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        others = others[:-1]
    return tuple(others)


def _queried(query: Callable[[], Any]) -> float | None:
    try:
        return float(query())
    except pynvml.NVMLError:
        return None
