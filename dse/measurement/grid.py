"""Latency over a grid of batch size x prompt length x new tokens; a cell that does not fit is recorded, not fatal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from dse.errors import OutOfMemoryError
from dse.measurement.latency import measure_latency
from dse.measurement.latency_result import PairedLatency
from dse.measurement.out_of_memory import out_of_memory_errors
from dse.measurement.spec import LatencySpec
from dse.measurement.workload import Workload

__all__ = ["CellLatency", "grid_of", "measure_cell"]


@dataclass(frozen=True)
class CellLatency:
    """One cell of the grid.

    Attributes:
        spec: Its lengths and batch.
        latency: What was measured; None where it did not fit.
        attempts: Measurements taken until one was valid.
        discarded: Why the earlier ones were not.
        bytes_asked: What the device had no room for, where its allocator said; None otherwise.
        is_valid: Whether the timings can be trusted.
        reason: Why not; empty when valid.
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
    *,
    use_candidate: Callable[[], None],
    use_baseline: Callable[[], None],
    attempts: int = 5,
    progress: Callable[[int, int], None] | None = None,
    compiled: Workload | None = None,
) -> CellLatency:
    """Measure one cell, again where the machine was too disturbed to say anything; what is compiled serves every try.

    Args:
        model: The resident model; see `measure_latency`.
        spec: The cell.
        use_candidate: Puts the subject's weights in place; may be called while they are.
        use_baseline: Puts the dense weights back; likewise.
        attempts: Most measurements taken: another look is cheaper than a lost trial.
        progress: Told of generations done and expected.
        compiled: Of the same model and cell: what it has compiled for the dense side is used, and what is compiled for
            it now is left there for the next point.

    Raises:
        ConfigError: The prompt does not fit the model's context, or the mode cannot be had.
    """
    discarded: list[str] = []
    workload: Workload | None = None
    while True:
        try:
            if workload is None:
                workload = _workload(model, spec, compiled, use_candidate)
            latency = measure_latency(
                model,
                spec,
                use_candidate=use_candidate,
                use_baseline=use_baseline,
                progress=progress,
                workload=workload,
            )
            if compiled is not None:
                compiled.adopt(workload)
        except OutOfMemoryError as error:
            use_candidate()
            tried = len(discarded) + 1
            return CellLatency(spec, None, tried, tuple(discarded), error.bytes_asked, False, str(error))
        if latency.is_valid or len(discarded) + 1 >= attempts:
            return CellLatency(
                spec, latency, len(discarded) + 1, tuple(discarded), None, latency.is_valid, latency.reason
            )
        discarded.append(latency.reason)


def _workload(
    model: nn.Module, spec: LatencySpec, compiled: Workload | None, use_candidate: Callable[[], None]
) -> Workload:
    with out_of_memory_errors("measuring latency"):
        use_candidate()  # before anything runs, so that the first pass is the subject's
        workload = Workload(model, spec)
    if compiled is not None:
        workload.adopt(compiled)
    return workload


def grid_of(spec: LatencySpec, cells: Sequence[tuple[int, int, int]]) -> tuple[LatencySpec, ...]:
    """`spec` for each (batch size, prompt tokens, new tokens)."""
    return tuple(replace(spec, batch_size=batch, prompt_tokens=prompt, new_tokens=new) for batch, prompt, new in cells)
