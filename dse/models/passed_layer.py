"""The module that replaces a layer without any block left, while a point is applied to a resident model.

Exports have no such layer: they are written without it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dse.models.plain_attributes import copy_plain_attributes

__all__ = ["PassedLayer"]


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
