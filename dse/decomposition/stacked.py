"""Modules of a stack: several linear layers that read the same input and share the first product with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.decomposition.low_rank import LowRankFactors

__all__ = ["SharedProduct", "StackedLinear", "stacked_modules"]


class SharedProduct(nn.Module):
    """The product `x R^T` (and `C^T`) of a stack, computed once for all members in a forward pass.

    The first member to ask with an input computes; the others, handed the very same tensor, take the result. It is held
    until the last of them took it, so nothing outlives a layer, and a result is never given for another input than the
    one it was computed from: the tensor itself is compared, and where autograd counts changes in place, their number.
    A member that asks a second time gets a product computed anew.

    `torch.compile` follows this without a graph break: the compiled graph holds the product once. (Left to itself the
    compiler does not merge equal products in inference.)

    Args:
        right: Shape (rank, in_features).
        core: Shape (rank, rank), or None.
        members: How many linear layers share it.
    """

    def __init__(self, right: Tensor, core: Tensor | None, members: int) -> None:
        super().__init__()
        self.right = nn.Parameter(right, requires_grad=False)
        self.core = None if core is None else nn.Parameter(core, requires_grad=False)
        self.members = members
        # Input, its version, product, and one bit for each member that took it. One attribute, replaced as a whole: a
        # second thread sees one state or the other.
        self._held: tuple[Tensor, int, Tensor, int] | None = None

    def forward(self, x: Tensor, member: int) -> Tensor:
        """Map (..., in_features) to (..., rank) for the member of this number."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        held, own = self._held, 1 << member
        if held is not None and held[0] is x and held[1] == version and not held[3] & own:
            product, taken = held[2], held[3] | own
        else:
            product, taken = self._product(x), own
        self._held = (x, version, product, taken) if taken != (1 << self.members) - 1 else None
        return product

    def _product(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.right)
        return hidden if self.core is None else functional.linear(hidden, self.core)

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without a held product."""
        return {**vars(self), "_held": None}

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        core = ", core" if self.core is not None else ""
        return f"in_features={self.right.shape[1]}, rank={self.right.shape[0]}, members={self.members}{core}"


class StackedLinear(nn.Module):
    """One member of a stack: `y = (shared product) L^T + b`, with its own rows of the left factor and its own bias.

    Args:
        left: Shape (out_features, rank): the member's rows.
        bias: Shape (out_features,), or None.
        shared: The product it shares.
        member: Its number in the stack. Number 0 holds the shared product's weights as its own, so that they are
            counted and saved once.
    """

    def __init__(self, left: Tensor, bias: Tensor | None, shared: SharedProduct, member: int) -> None:
        super().__init__()
        LowRankFactors(left, shared.right, shared.core)  # the shapes must chain
        self.left = nn.Parameter(left, requires_grad=False)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.member = member
        if member == 0:
            self.owned = shared
        # In a tuple torch does not see it as a part of this module, but a deep copy follows it.
        self._shared = (shared,)

    @property
    def shared(self) -> SharedProduct:
        """The product it shares."""
        return self._shared[0]

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.left.shape[0]

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.shared.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns kept."""
        return self.left.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return functional.linear(self.shared(x, self.member), self.left, self.bias)

    def factors(self) -> LowRankFactors:
        """The member's own factors; the right one (and the core) are those of the whole stack."""
        core = self.shared.core
        return LowRankFactors(self.left.data, self.shared.right.data, None if core is None else core.data)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def stacked_modules(
    factors: LowRankFactors, rows: Sequence[slice], biases: Sequence[Tensor | None]
) -> tuple[StackedLinear, ...]:
    """The modules of a stack's members, in order.

    Args:
        factors: Of the stacked matrix: left (sum of out_features, rank), right (rank, in_features).
        rows: Each member's rows of the left factor.
        biases: Each member's bias.
    """
    shared = SharedProduct(factors.right, factors.core, len(rows))
    return tuple(
        StackedLinear(factors.left[own].contiguous(), bias, shared, i)
        for i, (own, bias) in enumerate(zip(rows, biases, strict=True))
    )
