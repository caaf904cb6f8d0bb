"""Energy of NVIDIA GPUs through NVML."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pynvml
import torch

from dse.measurement.meter import DeviceCondition, EnergyMeter
from dse.measurement.meter_errors import (
    DeviceLostError,
    DriverRestartedError,
    EnergyNotSupportedError,
    EnergyWindowError,
    MigDeviceError,
    NoDriverError,
    ReadingFailedError,
)
from dse.measurement.nvml_condition import condition_of
from dse.measurement.nvml_driver import ANOTHER_GPU, GpuFacts, connect, describe_gpus, find_handle, visible_device
from dse.measurement.readings import SENSOR_PERIOD_S, Channel, CounterReadings, PowerReadings

__all__ = ["GpuFacts", "NvmlMeter", "describe_gpus", "visible_device"]

_PROBE_S = 1.0
_PROBE_STEP_S = 0.001


@dataclass(frozen=True)
class _Gpu:
    handle: Any
    uuid: str
    name: str
    has_counter: bool
    has_instant_power: bool


class NvmlMeter(EnergyMeter):
    """Joules of one or more GPUs: the total-energy counter if all have one, otherwise integrated power samples.

    Args:
        devices: CUDA indices, as in "cuda:0" (positions among the GPUs visible to this process), or UUIDs.
        force_power: Integrate power even if there is a counter, to compare the two.

    Raises:
        NoMeterError: There is no driver, no permission, no such GPU, a MIG device, or neither counter nor power. The
            type gives the cause, and the message the remedy.
    """

    name = "nvml"

    def __init__(self, devices: Sequence[int | str] = (0,), *, force_power: bool = False) -> None:
        self._devices = tuple(devices)
        self._force_power = force_power
        self._is_stale = False
        self._open()

    def _open(self) -> None:
        driver_version = connect()
        self._gpus = tuple(_open_gpu(device) for device in self._devices)
        self.details = {"driver_version": driver_version} | {f"gpu {gpu.uuid}": gpu.name for gpu in self._gpus}
        without = [gpu.uuid for gpu in self._gpus if not gpu.has_counter]
        if without:
            self.details["no_counter"] = f"not supported by {', '.join(without)}"
        self._is_counter = not without and not self._force_power
        instant = " (instantaneous)" if all(gpu.has_instant_power for gpu in self._gpus) else ""
        self.source = "NVML total-energy counter" if self._is_counter else f"NVML power{instant}, integrated"
        self.period_s = None if self._is_counter else (self.probe_period_s() or SENSOR_PERIOD_S)
        self._is_stale = False

    def channels(self) -> tuple[Channel, ...]:
        """See `EnergyMeter.channels`. Devices are looked up again after a restart of the driver."""
        if self._is_stale:
            self._open()
        return tuple(Channel(gpu.uuid, partial(self._read, gpu), self._new_readings) for gpu in self._gpus)

    def conditions(self, window_s: float | None = None) -> tuple[DeviceCondition, ...]:
        """See `EnergyMeter.conditions`."""
        self.synchronize()
        return tuple(condition_of(gpu.handle, gpu.uuid, window_s) for gpu in self._gpus)

    def synchronize(self) -> None:
        """See `EnergyMeter.synchronize`. A process that has not used CUDA has queued nothing."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for device in self._devices:
                if isinstance(device, int):
                    torch.cuda.synchronize(device)
                else:
                    for index in range(torch.cuda.device_count()):
                        torch.cuda.synchronize(index)

    def probe_period_s(self) -> float | None:
        """See `EnergyMeter.probe_period_s`; the median time between two changes on the first device."""
        changed_s: list[float] = []
        before = self._read(self._gpus[0])
        begin_s = time.perf_counter()
        while (now_s := time.perf_counter()) < begin_s + _PROBE_S:
            value = self._read(self._gpus[0])
            if value != before:
                changed_s.append(now_s)
                before = value
            time.sleep(_PROBE_STEP_S)
        steps_s = sorted(later - earlier for earlier, later in itertools.pairwise(changed_s))
        return steps_s[len(steps_s) // 2] if len(steps_s) >= 3 else None

    def _new_readings(self) -> CounterReadings | PowerReadings:
        return CounterReadings() if self._is_counter else PowerReadings(self.period_s or SENSOR_PERIOD_S)

    def _read(self, gpu: _Gpu) -> float:
        try:
            if self._is_counter:
                return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)) * 1e-3  # millijoules
            return _power_w(gpu)
        except pynvml.NVMLError as error:
            failure = _window_error(error, gpu, "energy" if self._is_counter else "power")
            self._is_stale = self._is_stale or isinstance(failure, DriverRestartedError)
            raise failure from error


def _open_gpu(device: int | str) -> _Gpu:
    where = f"cuda:{device}" if isinstance(device, int) else f"GPU {device}"
    try:
        handle = find_handle(device)
        uuid, name = str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        reason = f"{where} does not answer: {error}"
        raise NoDriverError("nvml", reason, "check whether `nvidia-smi` lists it") from error
    if _is_mig(handle):
        reason = f"{where} ({name}) is split by MIG, and its energy is that of all instances together"
        raise MigDeviceError("nvml", reason, f"use a whole GPU (`sudo nvidia-smi -mig 0`), {ANOTHER_GPU}")
    has_instant = False
    with contextlib.suppress(pynvml.NVMLError):
        _instant_power_w(handle)
        has_instant = True
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return _Gpu(handle, uuid, name, has_counter=True, has_instant_power=has_instant)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        pass  # older than Volta, or an old driver: power may still be available
    except pynvml.NVMLError as error:
        reason = f"the energy of {where} ({name}) cannot be read: {error}"
        raise EnergyNotSupportedError("nvml", reason, ANOTHER_GPU) from error
    try:
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except pynvml.NVMLError as error:
        reason = f"{where} ({name}) has no energy counter, and its power cannot be read: {error}"
        raise EnergyNotSupportedError("nvml", reason, ANOTHER_GPU) from error
    return _Gpu(handle, uuid, name, has_counter=False, has_instant_power=has_instant)


def _is_mig(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except pynvml.NVMLError:
        return False  # GPUs and drivers without MIG reject the query


def _power_w(gpu: _Gpu) -> float:
    """Instantaneous power if the driver reports it; the plain call averages over a second on Ampere and later."""
    if gpu.has_instant_power:
        return _instant_power_w(gpu.handle)
    return float(pynvml.nvmlDeviceGetPowerUsage(gpu.handle)) * 1e-3  # milliwatts


def _instant_power_w(handle: Any) -> float:
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
    if field.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(field.nvmlReturn)
    return float(field.value.uiVal) * 1e-3


def _window_error(error: Any, gpu: _Gpu, what: str) -> EnergyWindowError:
    """The error for a failed reading, by its NVML code."""
    message = f"the {what} of {gpu.name} ({gpu.uuid}) could not be read: {error}"
    if isinstance(error, (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired, pynvml.NVMLError_NotFound)):
        return DeviceLostError(f"{message}; see `dmesg | grep -i xid`, and reset the device or reboot")
    if isinstance(error, (pynvml.NVMLError_Uninitialized, pynvml.NVMLError_DriverNotLoaded)):
        return DriverRestartedError(f"{message}; the driver was restarted or unloaded")
    return ReadingFailedError(message)
