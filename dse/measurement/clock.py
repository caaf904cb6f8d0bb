"""Stopwatches that time one call, with the device synchronised before and after."""

from __future__ import annotations

import contextlib
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch

__all__ = ["CudaEventStopwatch", "MonotonicStopwatch", "Stopwatch", "stopwatch_for", "synchronize"]

Result = TypeVar("Result")


def synchronize(devices: Sequence[torch.device]) -> None:
    """Wait until every accelerator in `devices` has finished its queued work; does nothing for a CPU."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type != "cpu":
            torch.accelerator.synchronize(device)


class Stopwatch(ABC):
    """Times one call; `source` names the clock in records."""

    source: ClassVar[str]

    @abstractmethod
    def time(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """Run `work` once; returns its result and the seconds it took, device time included."""


class MonotonicStopwatch(Stopwatch):
    """The host's monotonic clock between two synchronisations of the devices."""

    source = "perf_counter_ns"

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._devices = tuple(devices)

    def time(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """See `Stopwatch.time`."""
        with _no_garbage_collection():
            synchronize(self._devices)
            begin_ns = time.perf_counter_ns()
            result = work()
            synchronize(self._devices)
            return result, (time.perf_counter_ns() - begin_ns) * 1e-9


class CudaEventStopwatch(Stopwatch):
    """CUDA events on the current stream of one GPU: the device's own clock, gaps between kernels included."""

    source = "cuda_events"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """See `Stopwatch.time`."""
        with _no_garbage_collection(), torch.cuda.device(self._device):
            begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)
            begin.record()
            result = work()
            end.record()
            torch.cuda.synchronize(self._device)
            return result, float(begin.elapsed_time(end)) * 1e-3  # milliseconds to seconds


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection during a timing, as `timeit` does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def stopwatch_for(devices: Sequence[torch.device]) -> Stopwatch:
    """The best clock for a model on `devices`.

    One GPU is timed with CUDA events. Several GPUs have no common event clock, so the host's clock is read between
    synchronisations of all of them, as for any other accelerator.
    """
    if len(devices) == 1 and devices[0].type == "cuda":
        return CudaEventStopwatch(devices[0])
    return MonotonicStopwatch(devices)
