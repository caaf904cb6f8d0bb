"""Modules for models with removed blocks: the block that returns zero, and the list of layers of an export.

Exports copy this file's classes into their modelling file (`dse.export.modelling_code`), so it imports torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["LayerGroup", "LayerList", "RemovedBlock"]


class RemovedBlock(nn.Module):
    """Replaces an attention or MLP block by one that returns zero, so that only the residual connection remains.

    Args:
        returned_items: 1 if the block returns a tensor; n if it returns a tuple of n with the output first.
    """

    def __init__(self, returned_items: int) -> None:
        super().__init__()
        self.returned_items = returned_items

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Return a 0-dimensional zero, which broadcasts when it is added to the residual stream."""
        for value in (*arguments, *keywords.values()):
            if isinstance(value, Tensor):
                zero = value.new_zeros(())
                return zero if self.returned_items == 1 else (zero, *[None] * (self.returned_items - 1))
        raise TypeError("a removed block must be called with a tensor, like the block it replaces, but got none")

    def extra_repr(self) -> str:
        """Settings for `print(model)`."""
        return f"returned_items={self.returned_items}"


class LayerGroup:
    """Layers that the model's loop runs as one: one layer with attention, and neighbours without.

    Args:
        layers: The layers, in order.
        main: Index of the layer with attention; the model's loop may read its attributes.
    """

    def __init__(self, layers: Sequence[nn.Module], main: int) -> None:
        self.layers = layers
        self.main = layers[main]

    def __getattr__(self, name: str) -> Any:
        """An attribute of the layer with attention, for example its kind of attention."""
        if name.startswith("__") or name in ("layers", "main"):
            raise AttributeError(name)
        return getattr(self.main, name)

    def __call__(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """Run the layers one after another with the same arguments; returns what the last one returns."""
        output: Any = hidden_states
        for layer in self.layers:
            output = layer(output[0] if isinstance(output, tuple) else output, *arguments, **keywords)
        return output


class LayerList(nn.ModuleList):
    """The layers of a model in which some have no attention.

    The config counts the attention blocks that are left: that many KV caches exist, and that many kinds of attention
    are listed. A model's loop runs over `layers[:config.num_hidden_layers]` and numbers what it gets. So a slice counts
    groups of layers with one attention block each, and all layers together still run.

    Args:
        layers: The layers.
        groups: For each group, its number of layers, and the index of the one with attention among them.
    """

    def __init__(self, layers: Sequence[nn.Module], groups: Sequence[tuple[int, int]]) -> None:
        super().__init__(layers)
        self.groups = tuple((size, main) for size, main in groups)

    def __getitem__(self, index: Any) -> Any:
        """One layer for a number; for a slice, that slice of the groups."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        layers, found = list(self), []
        for size, main in self.groups:
            found.append(layers[0] if size == 1 else LayerGroup(layers[:size], main))
            del layers[:size]
        return found[index]
