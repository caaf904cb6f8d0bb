"""Remove whole blocks from a resident model: the swaps, and the KV-cache slots of the remaining attention blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from dse.decomposition.swaps import Swap, module_swap
from dse.errors import PointError
from dse.model_parts import RemovableBlock
from dse.models import PassedLayer, RemovedBlock
from dse.topology import Topology

__all__ = ["RemovalPlan", "cache_slots", "removal_plan", "removal_problems", "removal_swaps"]


@dataclass(frozen=True)
class RemovalPlan:
    """The changes that remove some blocks from a model, by module path.

    Attributes:
        blocks: Removed blocks, to the number of items each returns (see `RemovableBlock`).
        norms: Norms whose output is no longer used.
        layers: Layers without any block left, to the number of items each returns.
        cache_slots: Attention modules that move to another slot of the KV cache, to that slot.
    """

    blocks: Mapping[str, int]
    norms: tuple[str, ...]
    layers: Mapping[str, int]
    cache_slots: Mapping[str, int]


def removal_plan(topology: Topology, removed: Iterable[str]) -> RemovalPlan:
    """Plan the removal of these blocks, given by name.

    A layer that loses both its blocks is skipped as a whole. The remaining attention blocks move up in the KV cache
    (see `cache_slots`).
    """
    names = tuple(removed)
    passed = topology.passed_layers(names)
    blocks = [topology.blocks_by_name[name] for name in names]
    single = [block for block in blocks if block.layer not in passed]
    return RemovalPlan(
        {block.module: block.returned_items for block in single},
        tuple(norm for block in single for norm in block.norms),
        {block.layer_module: block.layer_returned_items for block in blocks if block.layer in passed},
        cache_slots(topology, names),
    )


def removal_swaps(model: nn.Module, topology: Topology, removed: Iterable[str]) -> Iterator[Swap]:
    """The swaps that make the dense `model` skip these blocks, given by name."""
    plan = removal_plan(topology, removed)
    for path, items in plan.blocks.items():
        yield module_swap(model, path, RemovedBlock(items))
    for path in plan.norms:
        yield module_swap(model, path, nn.Identity())
    for path, items in plan.layers.items():
        yield module_swap(model, path, PassedLayer(model.get_submodule(path), items))
    for path, slot in plan.cache_slots.items():
        module = model.get_submodule(path)
        yield Swap(module, "layer_idx", module.layer_idx, slot)


def cache_slots(topology: Topology, removed: Iterable[str]) -> dict[str, int]:
    """Path of each attention module that must move to another slot of the KV cache if the named blocks are removed.

    Transformers sizes its caches by the config, with a kind per slot, and reads the sequence length from the first slot
    (for masks, from the first slot of each kind). So the remaining attention blocks of a kind fill the slots of that
    kind from the front; the last slots stay empty and use no memory.

    Returns:
        Module path to the new slot.
    """
    names = set(removed)
    attention = [block for block in topology.blocks if block.cache_module]
    slots: dict[str, int] = {}
    for kind in {block.cache_kind for block in attention}:
        of_kind = [block for block in attention if block.cache_kind == kind]
        remaining = [block for block in of_kind if block.name not in names]
        moves = zip(remaining, of_kind, strict=False)
        slots |= {block.cache_module: slot.layer for block, slot in moves if block.layer != slot.layer}
    return slots


def removal_problems(model: nn.Module, block: RemovableBlock) -> list[PointError]:
    """Reasons why this block cannot be removed from this model; empty if it can."""
    for path in (block.layer_module, block.module, *block.norms):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return [
                PointError(f"the model must have the module '{path}' ('{block.name}'), but it has none: another model?")
            ]
        if isinstance(module, (RemovedBlock, PassedLayer)):
            rule = f"'{block.name}' must be in the model before a point is applied"
            return [PointError(f"{rule}, but it is removed already; undo first")]
    return []
