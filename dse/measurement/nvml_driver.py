"""The NVIDIA driver and its list of GPUs, through `pynvml` (distribution `nvidia-ml-py`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

from dse.measurement.meter_errors import DeviceNotListedError, MeterPermissionError, MigDeviceError, NoDriverError

__all__ = ["ANOTHER_GPU", "GpuFacts", "connect", "describe_gpus", "find_handle", "visible_device"]

ANOTHER_GPU = "choose another GPU, or remove energy from the objectives"
_DRIVER_REMEDY = "install the NVIDIA driver, and start containers with --gpus (nvidia-container-toolkit)"
_LIST_REMEDY = "change CUDA_VISIBLE_DEVICES or the device"

_START_PROBLEMS = {
    pynvml.NVMLError_LibraryNotFound: ("no NVIDIA driver (libnvidia-ml.so.1 is missing)", _DRIVER_REMEDY),
    pynvml.NVMLError_DriverNotLoaded: ("the NVIDIA driver is not loaded", "load it: `sudo modprobe nvidia`"),
    pynvml.NVMLError_LibRmVersionMismatch: (
        "the NVIDIA driver and its library have different versions",
        "reboot, or reload the driver",
    ),
}


@dataclass(frozen=True)
class GpuFacts:
    """NVML's description of one GPU."""

    index: int
    uuid: str
    name: str
    driver_version: str


def connect() -> str:
    """Connect to the driver and return its version. NVML counts connections and closes them with the process.

    Raises:
        NoDriverError: The driver does not respond.
        MeterPermissionError: This user may not query the driver.
    """
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError_NoPermission as error:
        reason = "the NVIDIA driver may not be queried by this user"
        raise MeterPermissionError("nvml", reason, "give this user access to /dev/nvidia*") from error
    except pynvml.NVMLError as error:
        unknown = f"NVML does not start: {error}", "check whether `nvidia-smi` works"
        raise NoDriverError("nvml", *_START_PROBLEMS.get(type(error), unknown)) from error


def describe_gpus() -> list[GpuFacts]:
    """Every GPU of the machine, including hidden ones.

    Raises:
        NoMeterError: NVML does not respond.
    """
    driver_version = connect()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            GpuFacts(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), driver_version)
            for index, handle in enumerate(handles)
        ]
    except pynvml.NVMLError as error:
        raise NoDriverError("nvml", f"the GPUs cannot be listed: {error}", _DRIVER_REMEDY) from error


def find_handle(device: int | str) -> Any:
    """NVML's handle of a GPU.

    Args:
        device: A CUDA index, as in "cuda:0" (a position among the GPUs visible to this process), or the start of a
            UUID. CUDA and NVML number GPUs differently, so the UUID is used if torch knows it.

    Raises:
        NoMeterError: There is no such GPU, it is hidden, or it is a MIG instance.
    """
    if isinstance(device, str):
        return _handle_of(device, f"GPU {device}")
    where = f"cuda:{device}"
    if torch.cuda.is_available() and device < torch.cuda.device_count():
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        if uuid is not None:
            try:
                return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            except pynvml.NVMLError_NotFound:
                pass  # a MIG instance has another name: look it up in the list below
    return _handle_of(visible_device(device, os.environ.get("CUDA_VISIBLE_DEVICES")), where)


def visible_device(index: int, visible: str | None) -> int | str:
    """The physical index or (start of the) UUID of "cuda:`index`" under CUDA_VISIBLE_DEVICES.

    Args:
        index: CUDA index within the process.
        visible: Value of CUDA_VISIBLE_DEVICES; None if it is not set, which makes every GPU visible.

    Raises:
        DeviceNotListedError: The GPU is hidden.
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
            break  # CUDA ignores everything from the first invalid entry on, such as "-1"
    if index >= len(shown):
        reason = f"CUDA_VISIBLE_DEVICES={visible!r} shows {len(shown)} GPUs, so cuda:{index} does not exist"
        raise DeviceNotListedError("nvml", reason, _LIST_REMEDY)
    return shown[index]


def _handle_of(chosen: int | str, where: str) -> Any:
    if isinstance(chosen, str) and chosen.startswith("MIG-"):
        reason = f"{where} is the MIG instance {chosen}, which has no energy meter"
        raise MigDeviceError("nvml", reason, ANOTHER_GPU)
    handles: Sequence[Any] = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    if isinstance(chosen, int):
        matches = handles[chosen : chosen + 1]
    else:
        matches = [handle for handle in handles if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(chosen)]
    if len(matches) == 1:
        return matches[0]
    named = where if where == f"GPU {chosen}" else f"{where} is GPU {chosen}"
    which = "without it" if not matches else f"{len(matches)} of them with that name"
    reason = f"{named}, but the driver lists {len(handles)} GPUs {which}"
    raise DeviceNotListedError("nvml", reason, _LIST_REMEDY)
