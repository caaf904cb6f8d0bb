"""The points of `benchmarks/realised_speed.py`: by rule, and allocated over a sensitivity profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dse.cost import cost
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import AllocationError
from dse.measurement import LatencySpec
from dse.measurement.device_profile import model_profile
from dse.measurement.device_profile.model_profile import Phase
from dse.models import LoadedModel
from dse.runtime import timings_for
from dse.sensitivity.allocation import allocate
from dse.sensitivity.option_latency import with_latencies
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology

__all__ = ["KINDS", "point_of", "table_in_time"]

KINDS = ("ranks", "stacks", "blocks", "allocated", "timed")
_STEPS = 24


def point_of(
    kind: str, topology: Topology, reduction: float, multiple: int, table: SensitivityTable | None
) -> DesignPoint:
    """The point of a kind whose reduction is nearest to this, or just above it where it is allocated over `table`."""
    if table is not None and kind == "timed":
        return timed_point(table, reduction)
    if table is not None and kind == "allocated":
        return allocate(table, reduction=reduction).point
    if kind == "blocks":
        return blocks_point(topology, reduction, multiple)
    names = tensors(topology) if kind == "ranks" else stacks_and_others(topology)
    return ranks_point(topology, names, reduction, multiple)


def uniform_ranks(topology: Topology, names: list[str], fraction: float, multiple: int) -> dict[str, TensorChoice]:
    """All these matrices with this fraction of their parameters, at ranks that are multiples."""
    choices = {}
    for name in names:
        rows, columns = topology.matrix(name).shape
        rank = round(fraction * rows * columns / (rows + columns) / multiple) * multiple
        choices[name] = TensorChoice("svd", max(multiple, rank))
    return choices


def tensors(topology: Topology) -> list[str]:
    return [tensor.name for tensor in topology.tensors if tensor.layer is not None]


def stacks_and_others(topology: Topology) -> list[str]:
    stacked = {name for stack in topology.stacks for name in topology.tensors_of(stack.name)}
    return [stack.name for stack in topology.stacks] + [name for name in tensors(topology) if name not in stacked]


def ranks_point(topology: Topology, names: list[str], reduction: float, multiple: int) -> DesignPoint:
    """Every matrix decomposed alike: the fraction whose reduction is nearest."""
    found = [DesignPoint.of(uniform_ranks(topology, names, 0.02 * step, multiple)) for step in range(5, 50)]
    return min(found, key=lambda point: abs(cost(topology, point).reduction - reduction))


def blocks_point(topology: Topology, reduction: float, multiple: int) -> DesignPoint:
    """Half of the reduction by removed blocks, from the last third on backwards, the rest by ranks of MLP tensors."""
    last = topology.layer_count - 2
    removed: dict[str, TensorChoice] = {}
    for layer in range(last, 0, -1):
        for role in ("mlp", "attention") if (last - layer) % 2 == 0 else ("attention",):
            larger = {**removed, f"layers.{layer}.{role}": TensorChoice.removal()}
            if cost(topology, DesignPoint.of(larger)).reduction <= reduction / 2:
                removed = larger
    gone = {name for block in removed for name in topology.tensors_of(block)}
    names = [
        name
        for name in stacks_and_others(topology)
        if name.endswith(("gate_up", "down")) and not gone & set(topology.tensors_of(name))
    ]
    found = [
        DesignPoint.of({**removed, **uniform_ranks(topology, names, 0.02 * step, multiple)}) for step in range(5, 50)
    ]
    return min(found, key=lambda point: abs(cost(topology, point).reduction - reduction))


def table_in_time(
    loaded: LoadedModel, table: SensitivityTable, spec: LatencySpec, dense_s: Mapping[str, float]
) -> SensitivityTable:
    """The table with the mean of both phases' predicted times relative to dense as its latency.

    Args:
        loaded: The model, dense.
        table: Of its blocks.
        spec: Batch size and prompt.
        dense_s: Phase to seconds of the dense model.
    """
    profile = model_profile(loaded, timings_for(loaded.model))
    phases = {name: Phase.of(name, spec.batch_size, spec.prompt_tokens) for name in dense_s}
    tables = [with_latencies(table, profile, phase, dense_s=dense_s[name]) for name, phase in phases.items()]
    scales = [1 / (len(tables) * seconds) for seconds in dense_s.values()]
    units = [
        dataclasses.replace(
            units[0],
            options=tuple(
                dataclasses.replace(
                    options[0],
                    latency_s=sum(
                        scale * (option.latency_s or 0.0) for scale, option in zip(scales, options, strict=True)
                    ),
                )
                for options in zip(*(unit.options for unit in units), strict=True)
            ),
        )
        for units in zip(*(one.units for one in tables), strict=True)
    ]
    return dataclasses.replace(table, units=tuple(units), latency_dense_s=1.0)


def timed_point(table: SensitivityTable, reduction: float) -> DesignPoint:
    """The allocation under the loosest time that removes at least this share of the parameters."""
    low, high = 0.0, 1.0  # share of the time that may be taken: too little, and more than enough
    best = DesignPoint()
    for _ in range(_STEPS):
        middle = (low + high) / 2
        try:
            found = allocate(table, latency_s=middle)
        except AllocationError:
            low = middle
            continue
        if found.reduction >= reduction:
            low, best = middle, found.point
        else:
            high = middle
    return best
