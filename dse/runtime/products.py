"""Matrix products in the layout that a device multiplies fastest; one first product for modules that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LAYOUTS", "ChainLinear", "Layout", "Product", "SharedProduct"]

Layout = Literal["row_major", "column_major"]
LAYOUTS: tuple[Layout, ...] = ("row_major", "column_major")
"""How a weight (out_features, in_features) lies in memory: row by row, as `nn.Linear` holds it, or column by column."""


class Product(nn.Module):
    """`y = x W^T + b` with W in a layout of choice.

    Args:
        weight: Shape (out_features, in_features) for `row_major`, (in_features, out_features) for `column_major`.
        layout: Which of them.
        bias: Shape (out_features,), or None.
    """

    def __init__(self, weight: Tensor, layout: Layout, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight_data = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.layout = layout
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.weight_data.shape[0 if self.layout == "row_major" else 1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self.layout == "row_major":
            return functional.linear(x, self.weight_data, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.weight_data if self.bias is None else torch.addmm(self.bias, rows, self.weight_data)
        return y.view(*x.shape[:-1], -1)


class SharedProduct(nn.Module):
    """One product for several modules that are given the very same tensor; each takes its columns of it.

    Whichever is called first with a tensor computes for all. The others are served from that as long as they are given
    the same tensor object, and what was kept is let go with the last of them, so the order of calls does not matter and
    a call with another tensor computes anew.

    Args:
        product: The product with the concatenated weights, or a chain that ends in one.
        sizes: Columns of each module's part, in the order of the weights.
    """

    def __init__(self, product: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.product = product
        self.sizes = list(sizes)
        self._given: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._waiting: int = 0

    def part(self, index: int, x: Tensor) -> Tensor:
        """The part of module `index` for (..., in_features): shape (..., sizes[index]), a view of the whole."""
        if len(self.sizes) == 1:
            return self.product(x)  # type: ignore[no-any-return]
        if self._given is not x:
            self._parts = self.product(x).split(self.sizes, dim=-1)
            self._given, self._waiting = x, len(self.sizes)
        found = self._parts[index]
        self._waiting -= 1
        if self._waiting == 0:
            self._given, self._parts = None, ()
        return found


class ChainLinear(nn.Module):
    """A linear layer whose weight is one matrix or a chain of them; the first may be shared with other modules.

    Args:
        first: The shared first product; its bias is this layer's where there are no further matrices.
        index: Which part of it is this layer's.
        rest: Further matrices, in order.
    """

    def __init__(self, first: SharedProduct, index: int, rest: Sequence[Product] = ()) -> None:
        super().__init__()
        self.first = first
        self.index = index
        self.rest = nn.ModuleList(rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden = self.first.part(self.index, x)
        for product in self.rest:
            hidden = product(hidden)
        return hidden
