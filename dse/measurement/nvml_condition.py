"""Temperature, clocks, what holds the clocks down, and who else computes on an NVIDIA GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from dse.measurement.meter import DeviceCondition

__all__ = ["condition_of"]

# Bits of NVML's clock event reasons (nvml.h, nvmlClocksEventReason*). "Idle" is left out: nothing is held down.
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
_FAULTS = {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}


def condition_of(handle: Any, device: str) -> DeviceCondition:
    """How a GPU is now; what it does not tell is left out, and no question of it is an error.

    Args:
        handle: NVML's.
        device: Its name in records.
    """
    import pynvml

    limits = _clock_limits(handle)
    return DeviceCondition(
        device=device,
        temperature_celsius=_asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        core_clock_mhz=_asked(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        memory_clock_mhz=_asked(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        clock_limits=limits,
        throttled_by=tuple(name for name in limits if name in _FAULTS),
        other_processes=_other_processes(handle),
    )


def _clock_limits(handle: Any) -> tuple[str, ...]:
    import pynvml

    bits = _asked(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    if bits is None:  # drivers before 535 know it by its old name
        bits = _asked(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return tuple(name for bit, name in _CLOCK_LIMITS.items() if int(bits or 0) & bit)


def _other_processes(handle: Any) -> tuple[int, ...]:
    """Ids of other processes.

    In a container the driver tells ids of the host, among which ours is not to be found. If this process uses CUDA and
    its id is missing, one of the listed ones is its own: the last, for want of better, is left out.
    """
    import pynvml

    try:
        pids = sorted(int(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except pynvml.NVMLError:
        return ()
    others = [pid for pid in pids if pid != os.getpid()]
    if len(others) == len(pids) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        others = others[:-1]
    return tuple(others)


def _asked(question: Callable[[], Any]) -> float | None:
    import pynvml

    try:
        return float(question())
    except pynvml.NVMLError:
        return None
