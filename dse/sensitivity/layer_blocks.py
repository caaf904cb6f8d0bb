"""The attention and the MLP block of each layer: the units of a sensitivity profile."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dse.model_parts import DecomposableTensor, Matrix, TensorStack
from dse.topology import ATTENTION_ROLES, Topology

__all__ = ["Block", "blocks_of_topology", "groups_that_remain"]


@dataclass(frozen=True)
class Block:
    """The decomposable tensors of one attention or MLP block.

    Attributes:
        name: `layers.3.attention` or `layers.3.mlp`.
        layer: 0-based index.
        kind: attention or mlp.
        tensors: In the order of the forward pass.
        stacks: Stacks of some of its tensors, if they may be decomposed as one matrix.
    """

    name: str
    layer: int
    kind: str
    tensors: tuple[DecomposableTensor, ...]
    stacks: tuple[TensorStack, ...] = ()

    @property
    def partitions(self) -> tuple[tuple[Matrix, ...], ...]:
        """Ways to divide the block into matrices: its tensors; with stacks also the stacks and the other tensors."""
        stacked = {member.name for stack in self.stacks for member in stack.members}
        rest = tuple(tensor for tensor in self.tensors if tensor.name not in stacked)
        return (self.tensors, (*self.stacks, *rest)) if self.stacks else (self.tensors,)

    @property
    def parameters(self) -> int:
        """Parameters of its decomposable matrices."""
        return sum(tensor.parameters for tensor in self.tensors)


def blocks_of_topology(
    topology: Topology, names: Collection[str] | None = None, *, with_stacks: bool = False
) -> tuple[Block, ...]:
    """The blocks of a model in the order of the layers, attention first; tensors outside the layers are left out.

    Args:
        names: Restricts the blocks to these tensors; None for all.
        with_stacks: Whether the blocks list their stacks.
    """
    stacks: dict[tuple[int, str], list[TensorStack]] = {}
    for stack in topology.stacks if with_stacks else ():
        if names is None or all(member.name in names for member in stack.members):
            stacks.setdefault((stack.layer, _kind(stack)), []).append(stack)
    found: dict[tuple[int, str], list[DecomposableTensor]] = {}
    for tensor in topology.tensors:
        if tensor.layer is None or (names is not None and tensor.name not in names):
            continue
        found.setdefault((tensor.layer, _kind(tensor)), []).append(tensor)
    return tuple(
        Block(f"layers.{layer}.{kind}", layer, kind, tuple(tensors), tuple(stacks.get((layer, kind), ())))
        for (layer, kind), tensors in sorted(found.items(), key=lambda entry: entry[0])
    )


def _kind(matrix: Matrix) -> str:
    return "attention" if matrix.role in ATTENTION_ROLES else "mlp"


def groups_that_remain(topology: Topology) -> tuple[tuple[str, ...], ...]:
    """Groups of attention blocks that must not all be removed: all of them, and those of each kind of KV cache."""
    attention = [block for block in topology.blocks if block.role == "attention"]
    groups = [tuple(block.name for block in attention)] if len(attention) == topology.layer_count else []
    kinds = sorted({block.cache_kind for block in attention})
    if len(kinds) > 1:
        groups += [tuple(block.name for block in attention if block.cache_kind == kind) for kind in kinds]
    return tuple(groups)
