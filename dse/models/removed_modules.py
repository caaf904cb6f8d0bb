"""Modules that replace removed blocks and layers; they compute almost nothing.

Exports copy this file's classes into their modelling file (`dse.export.modelling_code`), so it imports torch only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["PassedLayer", "RemovedBlock", "copy_plain_attributes"]


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


class PassedLayer(nn.Module):
    """Replaces a layer whose attention and MLP are both removed: returns its input.

    Args:
        dense: The layer it replaces. Its plain attributes are copied, because the model may read some of them (such as
            the kind of attention).
        returned_items: 1 if the layer returns a tensor; n if it returns a tuple of n.
    """

    def __init__(self, dense: nn.Module, returned_items: int) -> None:
        super().__init__()
        copy_plain_attributes(dense, self)
        self.returned_items = returned_items

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Return the hidden states unchanged, shape (..., width)."""
        return hidden_states if self.returned_items == 1 else (hidden_states, *[None] * (self.returned_items - 1))


def copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy the public attributes of `source` that are strings, numbers or booleans to `target`."""
    for name, value in vars(source).items():
        if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
            setattr(target, name, value)
