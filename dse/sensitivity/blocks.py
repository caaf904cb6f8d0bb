"""The units that are decided on as one: the attention and the MLP block of each layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dse.topology import DecomposableTensor, Topology

__all__ = ["Block", "blocks_of_topology", "groups_that_remain"]

_ATTENTION_ROLES = frozenset({"query", "key", "value", "query_key_value", "attention_output"})


@dataclass(frozen=True)
class Block:
    """The decomposable tensors of one attention or MLP block.

    Attributes:
        name: `layers.3.attention` or `layers.3.mlp`.
        layer: 0-based index.
        kind: attention or mlp.
        tensors: In order of the forward pass.
    """

    name: str
    layer: int
    kind: str
    tensors: tuple[DecomposableTensor, ...]

    @property
    def parameters(self) -> int:
        """Entries of its decomposable matrices."""
        return sum(tensor.parameters for tensor in self.tensors)


def blocks_of_topology(topology: Topology, names: Collection[str] | None = None) -> tuple[Block, ...]:
    """The blocks of a model in order of layers, attention first; those of `names` alone where given.

    Tensors outside the layers belong to none.
    """
    found: dict[tuple[int, str], list[DecomposableTensor]] = {}
    for tensor in topology.tensors:
        if tensor.layer is None or (names is not None and tensor.name not in names):
            continue
        kind = "attention" if tensor.role in _ATTENTION_ROLES else "mlp"
        found.setdefault((tensor.layer, kind), []).append(tensor)
    return tuple(
        Block(f"layers.{layer}.{kind}", layer, kind, tuple(tensors))
        for (layer, kind), tensors in sorted(found.items(), key=lambda entry: entry[0])
    )


def groups_that_remain(topology: Topology) -> tuple[tuple[str, ...], ...]:
    """Attention blocks of which one at least must stay in the model: all of them, and those of each kind of cache."""
    attention = [block for block in topology.blocks if block.role == "attention"]
    groups = [tuple(block.name for block in attention)] if len(attention) == topology.layer_count else []
    kinds = sorted({block.cache_kind for block in attention})
    if len(kinds) > 1:
        groups += [tuple(block.name for block in attention if block.cache_kind == kind) for kind in kinds]
    return tuple(groups)
