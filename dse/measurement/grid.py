"""Latency over a grid of batch sizes, prompt lengths and new tokens; cells that do not fit are recorded, not fatal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from dse.errors import OutOfMemoryError
from dse.measurement.alternation import ModelSwap
from dse.measurement.latency import PairedLatency, measure_latency
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

__all__ = ["CellLatency", "grid_of", "measure_cell"]


@dataclass(frozen=True)
class CellLatency:
    """Latency of one cell of the grid.

    Attributes:
        spec: Lengths and batch size of the cell.
        latency: The measurement; None if the cell does not fit into memory.
        attempts: Measurements taken until one was valid.
        discarded: Why the earlier ones were invalid.
        bytes_asked: Size of the allocation that failed, if the allocator reports it; None otherwise.
        is_valid: Whether the timings are valid.
        reason: Why they are invalid; empty if valid.
    """

    spec: LatencySpec
    latency: PairedLatency | None
    attempts: int
    discarded: tuple[str, ...]
    bytes_asked: int | None
    is_valid: bool
    reason: str


def measure_cell(
    model: nn.Module,
    spec: LatencySpec,
    swap: ModelSwap,
    *,
    attempts: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> CellLatency:
    """Measure one cell, and repeat invalid measurements with the programs that are already compiled.

    Args:
        model: The resident model; see `measure_latency`.
        spec: The cell.
        swap: Swaps candidate and baseline in `model`; `use_candidate` must be idempotent here.
        attempts: Maximum number of measurements: a repetition is cheaper than a lost trial.
        progress: Called with generations done and expected.

    Raises:
        ConfigError: The prompt exceeds the model's context, or the mode is not available.
    """
    discarded: list[str] = []
    workload: Workload | None = None
    while True:
        tried = len(discarded) + 1
        try:
            if workload is None:
                with out_of_memory_errors("measuring latency"):
                    swap.use_candidate()  # before anything runs, so that the first pass is the candidate's
                    workload = Workload(model, spec)
            latency = measure_latency(model, spec, swap, progress=progress, workload=workload)
        except OutOfMemoryError as error:
            swap.use_candidate()
            return CellLatency(spec, None, tried, tuple(discarded), error.bytes_asked, False, str(error))
        if latency.is_valid or tried >= attempts:
            return CellLatency(spec, latency, tried, tuple(discarded), None, latency.is_valid, latency.reason)
        discarded.append(latency.reason)


def grid_of(spec: LatencySpec, cells: Sequence[tuple[int, int, int]]) -> tuple[LatencySpec, ...]:
    """`spec` for each (batch size, prompt tokens, new tokens)."""
    return tuple(replace(spec, batch_size=batch, prompt_tokens=prompt, new_tokens=new) for batch, prompt, new in cells)
