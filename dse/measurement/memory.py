"""Peak memory of one prefill and decode, beside the bytes of the weights."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dse.errors import InvalidMeasurementError
from dse.measurement.clock import synchronize
from dse.measurement.out_of_memory import out_of_memory_errors
from dse.measurement.workload import LatencySpec, Workload

__all__ = ["MemoryResult", "measure_peak_memory", "resident_weight_bytes"]

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class MemoryResult:
    """Memory of a model at work.

    Attributes:
        peak_bytes: Weights plus activations.
        weight_bytes: Parameters and buffers, shared ones once.
        activation_bytes: Rise of the peak while one prefill and decode ran, key-value cache included.
        method: How the rise was read.
    """

    peak_bytes: int
    weight_bytes: int
    activation_bytes: int
    method: str


def measure_peak_memory(model: nn.Module, spec: LatencySpec) -> MemoryResult:
    """Run one prefill and decode, after one to warm up, and read how far memory rose.

    On CUDA the allocator's statistics tell exactly. On a Linux CPU the kernel's high-water mark of the resident set
    is reset and read again; whatever else this process does meanwhile counts too.

    Raises:
        ConfigError: The prompt does not fit the model's context.
        OutOfMemoryError: The device has no room.
        InvalidMeasurementError: The peak cannot be read on this system.
    """
    with out_of_memory_errors("measuring memory"):
        workload = Workload(model, spec)

        def generate() -> None:
            state = workload.prefill()
            if workload.decodes:
                workload.decode(state)

        # The first pass touches mapped weights and makes the libraries' own buffers, which are not activations.
        generate()
        kinds = {device.type for device in workload.devices}
        if kinds == {"cuda"}:
            activation_bytes, method = _cuda_rise_bytes(generate, workload.devices), "CUDA allocator statistics"
        elif kinds == {"cpu"}:
            activation_bytes, method = _resident_rise_bytes(generate), "Linux VmHWM, reset before the run"
        else:
            raise InvalidMeasurementError(
                f"peak memory must be read on one kind of device, CUDA or CPU, but the model lies on "
                f"{', '.join(map(str, workload.devices))}; leave peak_memory_bytes out of the objectives"
            )
    weight_bytes = resident_weight_bytes(model)
    return MemoryResult(weight_bytes + activation_bytes, weight_bytes, activation_bytes, method)


def resident_weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of `model`; tensors that share memory are counted once."""
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        key = (tensor.device, tensor.data_ptr())
        # An expanded tensor names more elements than it stores.
        stored = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        sizes[key] = max(sizes.get(key, 0), stored)
    return sum(sizes.values())


def _cuda_rise_bytes(work: Callable[[], None], devices: tuple[torch.device, ...]) -> int:
    gc.collect()
    synchronize(devices)
    before = [torch.cuda.memory_allocated(device) for device in devices]
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(devices)
    return sum(torch.cuda.max_memory_allocated(device) - start for device, start in zip(devices, before, strict=True))


def _resident_rise_bytes(work: Callable[[], None]) -> int:
    try:
        gc.collect()
        _return_free_memory()
        # "5" resets the high-water mark to the present resident set (proc(5)).
        (_PROCESS / "clear_refs").write_text("5")
        before_bytes = _status_bytes("VmRSS")
        work()
        return max(0, _status_bytes("VmHWM") - before_bytes)
    except OSError as error:
        raise InvalidMeasurementError(
            f"peak memory on a CPU is read from {_PROCESS}/status and clear_refs (Linux), but: {error}; "
            f"leave peak_memory_bytes out of the objectives"
        ) from error


def _return_free_memory() -> None:
    """Give freed heap pages back to the kernel, so that the run must take them anew; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{field} is not in {_PROCESS}/status")
    return int(match[1]) * 1024
