"""Modules that stand where a block or a layer was removed; they cost next to nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["PassedLayer", "RemovedBlock"]


class RemovedBlock(nn.Module):
    """Stands in for an attention or MLP block whose output is zero: the residual stream passes it by.

    Args:
        returned_items: 1 where the block returns a tensor; n where it returns a tuple of n whose first is the output.
    """

    def __init__(self, returned_items: int) -> None:
        super().__init__()
        self.returned_items = returned_items

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor | None, ...]:
        """A zero without dimensions, which any residual stream takes without a copy of its size."""
        zero = _first_tensor(arguments, keywords).new_zeros(())
        return zero if self.returned_items == 1 else (zero, *[None] * (self.returned_items - 1))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"returned_items={self.returned_items}"


class PassedLayer(nn.Module):
    """Stands in for a layer of which nothing is left: hands its input on.

    Args:
        dense: The layer it stands for. The model may read plain settings of a layer (such as the kind of its
            attention), so they are taken over.
        returned_items: 1 where the layer returns a tensor; n where it returns a tuple of n.
    """

    def __init__(self, dense: nn.Module, returned_items: int) -> None:
        super().__init__()
        for name, value in vars(dense).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)
        self.returned_items = returned_items

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The hidden states as they came, shape (..., width)."""
        return hidden_states if self.returned_items == 1 else (hidden_states, *[None] * (self.returned_items - 1))


def _first_tensor(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a removed block must be handed a tensor, as the block that it stands for is, but got none")
