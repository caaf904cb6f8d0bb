"""Energy of NVIDIA GPUs through NVML; the only module that imports `pynvml` (distribution `nvidia-ml-py`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dse.errors import InvalidMeasurementError
from dse.measurement.energy_window import Channel, CounterTrack, EnergyMeter, NoMeterError, PowerTrack

__all__ = ["GpuFacts", "NvmlMeter", "describe_gpus", "visible_device"]

_DRIVER_REMEDY = "install the NVIDIA driver, and start containers with --gpus (nvidia-container-toolkit)"
_ANOTHER = "choose another GPU, or leave energy out of the objectives"


@dataclass(frozen=True)
class GpuFacts:
    """What NVML says of one GPU."""

    index: int
    uuid: str
    name: str
    driver_version: str


@dataclass(frozen=True)
class _Gpu:
    handle: Any
    uuid: str
    name: str
    has_counter: bool


class NvmlMeter(EnergyMeter):
    """Joules of one or several GPUs: the total-energy counter where all have one, else integrated power samples.

    Args:
        indices: CUDA indices, as in "cuda:0": positions among the GPUs that this process may see.

    Raises:
        NoMeterError: There is no driver, no permission, no such GPU, a MIG device, or neither counter nor power; a
            `MeterUnavailableError` with the remedy.
    """

    name = "nvml"

    def __init__(self, indices: Sequence[int] = (0,)) -> None:
        self._indices = tuple(indices)
        self._driver_version = _start()
        self._gpus = tuple(_open_gpu(index) for index in self._indices)
        self._is_counter = all(gpu.has_counter for gpu in self._gpus)

    @property
    def source(self) -> str:
        """See `EnergyMeter.source`."""
        return "NVML total-energy counter" if self._is_counter else "NVML power, integrated"

    @property
    def details(self) -> Mapping[str, str]:
        """See `EnergyMeter.details`."""
        names = {f"gpu {gpu.uuid}": gpu.name for gpu in self._gpus}
        return {"driver_version": self._driver_version, **names}

    def channels(self) -> tuple[Channel, ...]:
        """See `EnergyMeter.channels`."""
        read, track = (_read_counter_j, CounterTrack) if self._is_counter else (_read_power_w, PowerTrack)
        return tuple(Channel(gpu.uuid, partial(read, gpu), track) for gpu in self._gpus)

    def synchronize(self) -> None:
        """See `EnergyMeter.synchronize`. A process that never touched CUDA has queued nothing."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for index in self._indices:
                torch.cuda.synchronize(index)


def describe_gpus() -> list[GpuFacts]:
    """Every GPU of the machine, hidden ones too.

    Raises:
        NoMeterError: NVML does not answer.
    """
    import pynvml

    driver_version = _start()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            GpuFacts(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), driver_version)
            for index, handle in enumerate(handles)
        ]
    except pynvml.NVMLError as error:
        raise NoMeterError("nvml", f"the GPUs cannot be listed: {error}", _DRIVER_REMEDY) from error


def visible_device(index: int, visible: str | None) -> int | str:
    """What "cuda:`index`" means under CUDA_VISIBLE_DEVICES: a physical index, or (the start of) a UUID.

    Args:
        index: CUDA index within the process.
        visible: Value of CUDA_VISIBLE_DEVICES; None when it is not set, which shows every GPU.

    Raises:
        NoMeterError: The list hides that GPU.
    """
    if visible is None:
        return index
    shown: list[int | str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit():
            shown.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            shown.append(entry)
        else:
            break  # CUDA ignores all that follows the first entry it cannot read, "-1" for one
    if index >= len(shown):
        reason = f"CUDA_VISIBLE_DEVICES={visible!r} shows {len(shown)} GPUs, so cuda:{index} does not exist"
        raise NoMeterError("nvml", reason, "change CUDA_VISIBLE_DEVICES or the device")
    return shown[index]


def _start() -> str:
    """Connect to the driver; returns its version. NVML counts connections, and ends them with the process."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError_LibraryNotFound as error:
        raise NoMeterError("nvml", "no NVIDIA driver (libnvidia-ml.so.1 is not there)", _DRIVER_REMEDY) from error
    except pynvml.NVMLError_DriverNotLoaded as error:
        raise NoMeterError("nvml", "the NVIDIA driver is not loaded", "load it: `sudo modprobe nvidia`") from error
    except pynvml.NVMLError_LibRmVersionMismatch as error:
        reason = "the NVIDIA driver and its library have different versions"
        raise NoMeterError("nvml", reason, "reboot, or reload the driver") from error
    except pynvml.NVMLError_NoPermission as error:
        reason = "the NVIDIA driver may not be asked"
        raise NoMeterError("nvml", reason, "give this user access to /dev/nvidia*") from error
    except pynvml.NVMLError as error:
        raise NoMeterError("nvml", f"NVML does not start: {error}", "see whether `nvidia-smi` works") from error


def _open_gpu(index: int) -> _Gpu:
    import pynvml

    where = f"cuda:{index}"
    try:
        handle = _handle(index)
        uuid, name = str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        raise NoMeterError("nvml", f"{where} does not answer: {error}", "see whether `nvidia-smi` lists it") from error
    if _is_mig(handle):
        reason = f"{where} ({name}) is split by MIG, and its energy is that of all instances together"
        raise NoMeterError("nvml", reason, f"use a whole GPU (`sudo nvidia-smi -mig 0`), {_ANOTHER}")
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return _Gpu(handle, uuid, name, has_counter=True)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        pass  # older than Volta, or an old driver: power may still be there
    except pynvml.NVMLError as error:
        raise NoMeterError("nvml", f"the energy of {where} ({name}) cannot be read: {error}", _ANOTHER) from error
    try:
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except pynvml.NVMLError as error:
        reason = f"{where} ({name}) has no energy counter, and its power cannot be read: {error}"
        raise NoMeterError("nvml", reason, _ANOTHER) from error
    return _Gpu(handle, uuid, name, has_counter=False)


def _handle(index: int) -> Any:
    """NVML's handle of "cuda:`index`". CUDA and NVML number GPUs differently, so the UUID decides where it is known."""
    import pynvml

    if torch.cuda.is_available() and index < torch.cuda.device_count():
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        if uuid is not None:
            try:
                return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            except pynvml.NVMLError_NotFound:
                pass  # a MIG instance carries another name: the list below tells
    chosen = visible_device(index, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if isinstance(chosen, str) and chosen.startswith("MIG-"):
        raise NoMeterError("nvml", f"cuda:{index} is the MIG instance {chosen}, which has no meter", _ANOTHER)
    handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    if isinstance(chosen, int):
        if chosen < len(handles):
            return handles[chosen]
    else:
        matches = [handle for handle in handles if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(chosen)]
        if len(matches) == 1:
            return matches[0]
    reason = f"cuda:{index} is GPU {chosen}, but the driver lists {len(handles)} GPUs without it"
    raise NoMeterError("nvml", reason, "change CUDA_VISIBLE_DEVICES or the device")


def _is_mig(handle: Any) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except pynvml.NVMLError:
        return False  # GPUs and drivers without MIG refuse the question


def _read_counter_j(gpu: _Gpu) -> float:
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)) * 1e-3  # millijoules
    except pynvml.NVMLError as error:
        raise InvalidMeasurementError(f"the energy of {gpu.name} ({gpu.uuid}) could not be read: {error}") from error


def _read_power_w(gpu: _Gpu) -> float:
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetPowerUsage(gpu.handle)) * 1e-3  # milliwatts
    except pynvml.NVMLError as error:
        raise InvalidMeasurementError(f"the power of {gpu.name} ({gpu.uuid}) could not be read: {error}") from error
