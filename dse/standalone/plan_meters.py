"""Seconds and bytes of a block of work: how much of the time is spent in the layers, and the peak of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Peaks", "PhaseMeter", "available_bytes", "resident_bytes"]

_STATM = Path("/proc/self/statm")
_SAMPLE_S = 0.002


@dataclass
class Peaks:
    """What a block of work took.

    Attributes:
        seconds: In all.
        layer_seconds: In the forward passes of the layers.
        host_bytes: Peak of the process's resident memory, libraries included; 0 where it cannot be read.
        gpu_bytes: Peak of memory allocated on the GPU; 0 without one.
    """

    seconds: float = 0.0
    layer_seconds: float = 0.0
    host_bytes: int = 0
    gpu_bytes: int = 0

    def for_layers(self, count: float) -> float:
        """Seconds of the same work on a model of `count` layers instead of one."""
        return self.seconds - self.layer_seconds + count * self.layer_seconds


class PhaseMeter:
    """Measures blocks of work on a model of one layer.

    Args:
        layers: The layers of the model, whose forward passes are timed.
        device: Device of the model.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers, self._device = layers, device

    @contextmanager
    def measuring(self) -> Iterator[Peaks]:
        """Measure the block; the result is complete after it."""
        found, started = Peaks(), 0.0

        def before(_module: nn.Module, _arguments: Any) -> None:
            nonlocal started
            started = self._now()

        def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            found.layer_seconds += self._now() - started

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.register_forward_pre_hook(before))
                stack.enter_context(layer.register_forward_hook(after))
            sampler = stack.enter_context(_Sampler())
            start = self._now()
            yield found
            found.seconds = self._now() - start
        found.host_bytes = sampler.peak
        if self._device.type == "cuda":
            found.gpu_bytes = torch.cuda.max_memory_allocated(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Sampler:
    """Samples resident memory in a thread, since the kernel's own peak covers the whole life of the process."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Sampler:
        self.peak = resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the operating system does not tell (only Linux does so in this way)."""
    import os

    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available_bytes() -> int | None:
    """Memory that this process may use in all: what it has and what is free, within the limit of its control group."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, free) + resident_bytes()
