"""Condition of an NVIDIA GPU: temperature, clocks, clock limits, power, and other processes that compute on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pynvml
import torch

from dse.measurement.meter import DeviceCondition

__all__ = ["condition_of", "other_pids"]

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
_UTILIZATION_PERIOD_S = 1.0
"""NVML averages utilisation over up to this time (nvml.h, nvmlUtilization_t: between 1/6 s and 1 s)."""
_USED_PERCENT = 5.0
"""A GPU that is used less than this is idle: drivers report a few percent for their own work."""
_THROTTLING = {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}


def condition_of(handle: Any, device: str, window_s: float | None = None) -> DeviceCondition:
    """The current condition of a GPU. Values that it does not report are None; a failed query is no error.

    Args:
        handle: NVML's handle of the GPU, which has finished this process's work.
        device: Its name in records.
        window_s: Length of the window that has just ended; None before a window.
    """
    limits = _clock_limits(handle)
    contexts = _pids_with_context(handle)
    used_by, is_known = _use_by_others(handle, contexts, window_s)
    return DeviceCondition(
        device=device,
        temperature_celsius=_queried(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        core_clock_mhz=_queried(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        memory_clock_mhz=_queried(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        clock_limits=limits,
        throttled_by=tuple(name for name in limits if name in _THROTTLING),
        other_contexts=other_pids(dict.fromkeys(contexts, 0), contexts),
        other_processes=used_by,
        use_is_known=is_known,
        power_w=_queried(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) * 1e-3),
    )


def _clock_limits(handle: Any) -> tuple[str, ...]:
    bits = _queried(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    if bits is None:  # drivers before 535 use the old name
        bits = _queried(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return tuple(name for bit, name in _CLOCK_LIMITS.items() if int(bits or 0) & bit)


def _use_by_others(handle: Any, contexts: Sequence[int], window_s: float | None) -> tuple[tuple[int, ...], bool]:
    """Ids of the other processes that computed on the GPU, and whether that can be told.

    A process that merely holds a context disturbs nothing. NVML samples how much of the GPU each process uses; a sample
    covers the time since the one before it. Where it does not, the GPU's utilisation before a window tells, while this
    process's own work is done and no longer part of the sample: whatever uses the GPU then is another process's.
    """
    try:
        return other_pids(_activity(handle, window_s or 0.0), contexts), True
    except pynvml.NVMLError:
        others = other_pids(dict.fromkeys(contexts, 0), contexts)
    if not others:
        return (), True
    if window_s is not None:
        return (), True  # was told before the window
    time.sleep(_UTILIZATION_PERIOD_S)
    used_percent = _queried(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    if used_percent is None:
        return (), False
    return (others if used_percent >= _USED_PERCENT else ()), True


def _activity(handle: Any, window_s: float) -> dict[int, int]:
    """Process id to the largest share of the GPU (%) that it used in the last `window_s` seconds.

    Raises:
        pynvml.NVMLError: This GPU or driver does not report it.
    """
    since_us = int((time.time() - window_s) * 1e6)
    try:
        samples = pynvml.nvmlDeviceGetProcessUtilization(handle, since_us)
    except pynvml.NVMLError as error:
        # pynvml raises even for "success" where there is no sample.
        if error.value in (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND):
            return {}
        raise
    found: dict[int, int] = {}
    for sample in samples:
        if sample.timeStamp >= since_us and sample.smUtil > 0:
            found[int(sample.pid)] = max(int(sample.smUtil), found.get(int(sample.pid), 0))
    return found


def other_pids(activity: Mapping[int, int], contexts: Sequence[int]) -> tuple[int, ...]:
    """The processes of `activity` (process id to its share of the GPU) that are not this one.

    In a container the driver lists process ids of the host, which do not include this process's own. If this process
    uses CUDA and its id is not listed, the one that uses the GPU most is assumed to be its own.

    Args:
        activity: The processes.
        contexts: Ids of all processes that hold a context.
    """
    own = os.getpid()
    others = sorted((pid for pid in activity if pid != own), key=lambda pid: (-activity[pid], -pid))
    is_hidden = own not in contexts and own not in activity
    if is_hidden and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        others = others[1:]
    return tuple(sorted(others))


def _pids_with_context(handle: Any) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)))
    except pynvml.NVMLError:
        return ()


def _queried(query: Callable[[], Any]) -> float | None:
    try:
        return float(query())
    except pynvml.NVMLError:
        return None
