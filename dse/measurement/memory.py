"""Memory of a running model: weights, peaks of prefill and decode, and the computed size of the key-value cache."""

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
from dse.measurement.child_process import in_child_process
from dse.measurement.clock import synchronize
from dse.measurement.execution import Generation
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

__all__ = ["MemoryResult", "measure_peak_memory", "resident_weight_bytes"]

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class MemoryResult:
    """Memory of a running model.

    Attributes:
        peak_bytes: Weights plus the larger rise of the two phases.
        weight_bytes: Parameters and buffers on the device; shared ones count once.
        prefill_rise_bytes: Peak memory above the weights during prefill, key-value cache included.
        decode_rise_bytes: Peak memory above the weights during decode; None for encoders.
        kv_cache_bytes: Computed size of the full cache at the end: 2 x layers x key-value heads x head size x tokens x
            batch x element size; None if unknown.
        method: How the peaks were read.
    """

    peak_bytes: int
    weight_bytes: int
    prefill_rise_bytes: int
    decode_rise_bytes: int | None
    kv_cache_bytes: int | None
    method: str


def measure_peak_memory(
    model: nn.Module, spec: LatencySpec, *, kv_cache_bytes_per_token: int | None = None
) -> MemoryResult:
    """Run prefill and decode once, after one warm-up run, and read the peak memory of each.

    On CUDA the allocator's statistics are exact. On a Linux CPU the work runs in a forked child, so that earlier peaks
    and concurrent work of this process do not count. There the kernel's high-water mark of the resident set is reset
    before each phase and read after it.

    Args:
        model: The resident Hugging Face model in eval mode.
        spec: Lengths and batch size; decode steps always run eagerly.
        kv_cache_bytes_per_token: Bytes that one token of one sequence adds to the cache, if known.

    Raises:
        ConfigError: The prompt exceeds the model's context.
        OutOfMemoryError: The device has too little memory.
        InvalidMeasurementError: The peak cannot be read on this system.
    """
    with out_of_memory_errors("measuring memory"):
        workload = Workload(model, spec.eager())
        kinds = {device.type for device in workload.devices}
        if kinds == {"cuda"}:
            rises, method = _cuda_rises(workload), "CUDA allocator statistics"
        elif kinds == {"cpu"}:
            rises = _cpu_rises(workload)
            method = "resident set of a forked child (Linux VmHWM, reset before each phase)"
        else:
            raise InvalidMeasurementError(
                f"peak memory can be read on CUDA devices or on the CPU, but the model is on "
                f"{', '.join(map(str, workload.devices))}; remove peak_memory_bytes from the objectives"
            )
    weight_bytes = resident_weight_bytes(model)
    prefill, decode = rises[0], rises[1] if workload.decodes else None
    cached = None
    if kv_cache_bytes_per_token is not None and workload.decodes:
        cached = kv_cache_bytes_per_token * spec.batch_size * (spec.prompt_tokens + spec.new_tokens)
    return MemoryResult(weight_bytes + max(rises), weight_bytes, prefill, decode, cached, method)


def resident_weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of `model`; tensors that share memory count once."""
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        key = (tensor.device, tensor.data_ptr())
        # An expanded tensor has more elements than it stores.
        stored = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        sizes[key] = max(sizes.get(key, 0), stored)
    return sum(sizes.values())


def _phases(workload: Workload) -> tuple[Callable[[], None], ...]:
    """Prefill, followed by decode if the model decodes."""
    generation: Generation = workload.begin()
    if not workload.decodes:
        return (lambda: workload.prefill(generation),)
    return (lambda: workload.prefill(generation), lambda: workload.decode(generation))


def _warm_up(workload: Workload) -> None:
    """Run every phase once, and free its generation.

    A function of its own: a loop variable of the caller would keep the last phase, and with it the key-value cache,
    which would then count as memory that was there before.
    """
    for phase in _phases(workload):
        phase()
    del phase
    gc.collect()


def _cuda_rises(workload: Workload) -> list[int]:
    devices = workload.devices
    _warm_up(workload)
    synchronize(devices)
    before = [torch.cuda.memory_allocated(device) for device in devices]
    rises = []
    for phase in _phases(workload):
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        phase()
        synchronize(devices)
        peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
        rises.append(sum(peak - start for peak, start in zip(peaks, before, strict=True)))
    return rises


def _cpu_rises(workload: Workload) -> list[int]:
    try:
        _status_bytes("VmHWM")
    except OSError as error:
        raise InvalidMeasurementError(
            f"peak memory on a CPU is read from {_PROCESS}/status and clear_refs (Linux), but: {error}; "
            f"remove peak_memory_bytes from the objectives"
        ) from error
    gc.collect()

    def rises() -> list[int]:
        # The first pass touches mapped weights and allocates library buffers, which are not activations.
        with out_of_memory_errors("measuring memory"):
            _warm_up(workload)
            _return_free_memory()
            before_bytes = _status_bytes("VmRSS")
            found = []
            for phase in _phases(workload):
                _return_free_memory()  # activations of prefill would count as memory of decode
                # "5" resets the high-water mark to the current resident set (proc(5)).
                (_PROCESS / "clear_refs").write_text("5")
                phase()
                found.append(max(0, _status_bytes("VmHWM") - before_bytes))
            return found

    return [int(rise) for rise in in_child_process(rises, "measuring memory")]


def _return_free_memory() -> None:
    """Return freed heap pages to the kernel, so that the run has to allocate them again; glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_PROCESS}/status has no field {field}")
    return int(match[1]) * 1024
