"""Matrix products in the layout that a device multiplies fastest; one first product for modules that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.kernel import FEW_ROWS, KernelChains, ManyRows
from dse.runtime.onednn import linear_by_onednn

__all__ = ["LAYOUTS", "MANY_ROWS", "Chain", "Layout", "Product", "SharedLinear", "SharedProduct"]

Layout = Literal["row_major", "column_major", "row_major_onednn", "row_major_panels"]
LAYOUTS: tuple[Layout, ...] = ("row_major", "column_major", "row_major_onednn", "row_major_panels")
"""How a weight (out_features, in_features) lies in memory: row by row, as `nn.Linear` holds it, or column by column; or
row by row, and multiplied by oneDNN or by the panels of `dse.kernel` where rows of the input are many."""

MANY_ROWS: dict[Layout, ManyRows] = {
    "row_major": "torch",
    "row_major_onednn": "onednn",
    "row_major_panels": "panels",
}
"""What multiplies many rows by weights that lie row by row."""


class Product(nn.Module):
    """`y = x W^T + b` with W in a layout of choice.

    Args:
        weight: Shape (out_features, in_features), for `column_major` (in_features, out_features).
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
        return self.weight_data.shape[1 if self.layout == "column_major" else 0]

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.weight_data.shape[0 if self.layout == "column_major" else 1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self.layout == "row_major_onednn" and _is_many(x):
            return linear_by_onednn(x, self.weight_data, self.bias)
        if self.layout != "column_major":
            return functional.linear(x, self.weight_data, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.weight_data if self.bias is None else torch.addmm(self.bias, rows, self.weight_data)
        return y.view(*x.shape[:-1], -1)


class Chain(nn.Module):
    """What follows the first product for one of those who share it, and to whom its outputs go.

    Args:
        given: Columns of the first product that are this chain's.
        rest: Further matrices, in order; none where the first product is all.
        sizes: Columns of the result for each module that this chain serves: more than one for the members of a stack.
    """

    def __init__(self, given: int, rest: Sequence[Product] = (), sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        self.given = given
        self.rest = nn.ModuleList(rest)
        self.out_features = rest[-1].out_features if rest else given
        self.sizes = [self.out_features] if sizes is None else list(sizes)

    @property
    def products(self) -> list[Product]:
        """The further matrices."""
        return list(self.rest)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., given) to (..., out_features)."""
        for product in self.rest:
            hidden = product(hidden)
        return hidden


class SharedProduct(nn.Module):
    """One first product for several modules that are given the very same tensor; each takes its part of what follows.

    Whichever is called first with a tensor computes for all. The others are served from that as long as they are given
    the same tensor object, and what was kept is let go with the last of them, so the order of calls does not matter and
    a call with another tensor computes anew. Few rows, as in decode steps, go to the kernel of `dse.kernel`
    where there is one: all products of all chains in one call.

    Args:
        first: The product with the concatenated weights.
        chains: What follows, in the order of the weights.
        kernel: All of it as one call of the kernel; None where that cannot be had.

    Attributes:
        sizes: Columns of the result for each module, in order.
        kernel: As given.
    """

    def __init__(self, first: Product, chains: Sequence[Chain], kernel: KernelChains | None = None) -> None:
        super().__init__()
        self.first = first
        self.chains = nn.ModuleList(chains)
        self.sizes = [size for chain in chains for size in chain.sizes]
        self.kernel = kernel
        self._given: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._waiting: int = 0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (..., in_features) to the parts of all modules."""
        if self.kernel is not None and self.kernel.takes(x):
            return _split(self.kernel(x), self.sizes)
        given = _split(self.first(x), [chain.given for chain in self.chains])  # type: ignore[misc]
        parts = zip(self.chains, given, strict=True)
        return tuple(part for chain, hidden in parts for part in _split(chain(hidden), chain.sizes))  # type: ignore[arg-type]

    def part(self, index: int, x: Tensor) -> Tensor:
        """The part of module `index` for (..., in_features): shape (..., sizes[index])."""
        if len(self.sizes) == 1:
            return self(x)[0]  # type: ignore[no-any-return]
        if self._given is not x:
            self._parts = self(x)
            self._given, self._waiting = x, len(self.sizes)
        found = self._parts[index]
        self._waiting -= 1
        if self._waiting == 0:
            self._given, self._parts = None, ()
        return found


class SharedLinear(nn.Module):
    """A linear layer that is one part of a shared product.

    Args:
        shared: The product, and those who share it.
        index: Which part of it is this layer's.
    """

    def __init__(self, shared: SharedProduct, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.shared.part(self.index, x)


def _is_many(x: Tensor) -> bool:
    return x.numel() > FEW_ROWS * x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)


def _split(whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return (whole,) if len(sizes) == 1 else torch.split(whole, list(sizes), dim=-1)
