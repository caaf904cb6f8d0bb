"""Take whole blocks out of a resident model: what is swapped for what, and which slots of the KV cache are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from dse.errors import PointError
from dse.models import PassedLayer, RemovedBlock
from dse.topology import RemovableBlock, Topology

__all__ = ["RemovalPlan", "Swap", "cache_slots", "removal_plan", "removal_problems", "removal_swaps"]


class Swap(NamedTuple):
    """One attribute of one module that differs between the dense model and the point.

    Attributes:
        owner: The module whose attribute it is.
        attribute: Its name; a number in a list of modules.
        dense: Its value in the dense model.
        point: Its value while the point is applied.
    """

    owner: nn.Module
    attribute: str
    dense: Any
    point: Any


@dataclass(frozen=True)
class RemovalPlan:
    """What a model without some blocks is made of, by module path.

    Attributes:
        blocks: Blocks to take out, to the number of items each returns (see `RemovableBlock`).
        norms: Norms that nothing reads any more.
        layers: Layers of which nothing is left, to the number of items each returns.
        cache_slots: Attention modules that move to another slot of the KV cache, to that slot.
    """

    blocks: Mapping[str, int]
    norms: tuple[str, ...]
    layers: Mapping[str, int]
    cache_slots: Mapping[str, int]


def removal_plan(topology: Topology, removed: Iterable[str]) -> RemovalPlan:
    """How to take these blocks out.

    A layer that loses both its blocks is passed by as a whole. The attention blocks that remain move up in the KV cache
    (see `cache_slots`).

    Args:
        topology: Of the dense model.
        removed: Names of blocks.
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
    """What to exchange so that `model` passes these blocks by.

    Args:
        model: The dense model.
        topology: Its topology.
        removed: Names of blocks.
    """
    plan = removal_plan(topology, removed)
    for path, items in plan.blocks.items():
        yield _swap(model, path, RemovedBlock(items))
    for path in plan.norms:
        yield _swap(model, path, nn.Identity())
    for path, items in plan.layers.items():
        yield _swap(model, path, PassedLayer(model.get_submodule(path), items))
    for path, slot in plan.cache_slots.items():
        module = model.get_submodule(path)
        yield Swap(module, "layer_idx", module.layer_idx, slot)


def cache_slots(topology: Topology, removed: Iterable[str]) -> dict[str, int]:
    """Path of each attention module that must use another slot of the KV cache than its own, and that slot.

    Transformers sizes its caches by the config, with a kind for every slot, and reads the length of the sequence from
    the first slot (for masks: from the first of each kind). So the slots of a kind are filled from the front by the
    attention blocks of that kind that remain; the last ones stay empty and take no memory.

    Args:
        topology: Of the dense model.
        removed: Names of blocks.
    """
    gone = set(removed)
    attention = [block for block in topology.blocks if block.cache_module]
    slots: dict[str, int] = {}
    for kind in {block.cache_kind for block in attention}:
        of_kind = [block for block in attention if block.cache_kind == kind]
        remaining = [block for block in of_kind if block.name not in gone]
        slots |= {
            block.cache_module: slot.layer
            for block, slot in zip(remaining, of_kind, strict=False)
            if block.layer != slot.layer
        }
    return slots


def removal_problems(model: nn.Module, block: RemovableBlock) -> list[PointError]:
    """What keeps this block from being removed from this very model."""
    for path in (block.layer_module, block.module, *block.norms):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return [
                PointError(f"the model must have the module '{path}' ('{block.name}'), but it has none: another model?")
            ]
        if isinstance(module, (RemovedBlock, PassedLayer)):
            return [
                PointError(
                    f"'{block.name}' must be in the model before a point is applied, but it is removed already; undo"
                    " first"
                )
            ]
    return []


def _swap(model: nn.Module, path: str, point: nn.Module) -> Swap:
    parent, _, attribute = path.rpartition(".")
    dense = model.get_submodule(path)
    return Swap(model.get_submodule(parent), attribute, dense, point.train(dense.training))
