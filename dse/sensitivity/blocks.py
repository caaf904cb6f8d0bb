"""The units that are decided on as one: the attention and the MLP block of each layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dse.topology import DecomposableTensor, Topology

__all__ = ["Block", "blocks_of_topology"]

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
