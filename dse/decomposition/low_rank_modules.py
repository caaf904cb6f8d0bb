"""Modules that replace dense linear layers by low-rank factors.

Exports copy this file's classes into their modelling file (`dse.export.modelling_code`), so it imports torch only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LowRankLinear", "SharedProduct", "StackedLinear", "check_factor_shapes"]


class LowRankLinear(nn.Module):
    """Linear layer with a factorised weight: `y = ((x R^T) C^T) L^T + b`; C is absent unless a core is kept.

    One token costs 2r(m + n) FLOPs (plus 2r^2 for the core) instead of 2mn. Below the break-even rank that is less
    work, but in two or three small kernels instead of one, so fewer parameters do not guarantee a faster layer.

    Args:
        left: Shape (out_features, rank).
        right: Shape (rank, in_features).
        bias: Shape (out_features,), or None.
        core: Shape (rank, rank), or None.

    Source: Moar et al. (2024), figure 2, for the three-layer form that keeps the Tucker core.
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None, core: Tensor | None = None) -> None:
        super().__init__()
        check_factor_shapes(left, right, core)
        (self.out_features, self.rank), self.in_features = left.shape, right.shape[1]
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.core = None if core is None else nn.Parameter(core, requires_grad=False)
        # Reuse the dense module's bias parameter, so that it exists only once.
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden = nn.functional.linear(x, self.right)
        if self.core is not None:
            hidden = nn.functional.linear(hidden, self.core)
        return nn.functional.linear(hidden, self.left, self.bias)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        core = ", core" if self.core is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{core}"


class SharedProduct(nn.Module):
    """The product `x R^T` (and `C^T`) that the members of a stack share, computed once per forward pass.

    The first member to call computes the product; the others, called with the same input tensor, reuse it. It is
    released when the last member has taken it. It is reused only for the same tensor object and, where autograd counts
    in-place changes, the same version. A member that calls twice gets a new product.

    `torch.compile` traces this without a graph break, and the graph holds the product once. (In inference the compiler
    does not merge equal products by itself.)

    Args:
        right: Shape (rank, in_features).
        core: Shape (rank, rank), or None.
        members: Number of linear layers that share the product.
    """

    def __init__(self, right: Tensor, core: Tensor | None, members: int) -> None:
        super().__init__()
        self.right = nn.Parameter(right, requires_grad=False)
        self.core = None if core is None else nn.Parameter(core, requires_grad=False)
        self.members = members
        # Input, its version, the product, and a bit mask of the members that took it. One tuple, replaced as a whole,
        # so that another thread never sees a mixture of two states.
        self._held: tuple[Tensor, int, Tensor, int] | None = None

    def forward(self, x: Tensor, member: int) -> Tensor:
        """Map (..., in_features) to (..., rank) for the member with this index."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        held, own = self._held, 1 << member
        if held is not None and held[0] is x and held[1] == version and not held[3] & own:
            product, taken = held[2], held[3] | own
        else:
            product, taken = self._product(x), own
        self._held = (x, version, product, taken) if taken != (1 << self.members) - 1 else None
        return product

    def _product(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.right)
        return hidden if self.core is None else nn.functional.linear(hidden, self.core)

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without a held product."""
        return {**vars(self), "_held": None}

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        core = ", core" if self.core is not None else ""
        return f"in_features={self.right.shape[1]}, rank={self.right.shape[0]}, members={self.members}{core}"


class StackedLinear(nn.Module):
    """One member of a stack: `y = (shared product) L^T + b`, with its own rows of the left factor and its own bias.

    Args:
        left: The member's rows of the left factor, shape (out_features, rank).
        bias: Shape (out_features,), or None.
        shared: The product of the stack.
        member: Index in the stack. Member 0 registers `shared` as a submodule, so that its weights are counted and
            saved once.
    """

    def __init__(self, left: Tensor, bias: Tensor | None, shared: SharedProduct, member: int) -> None:
        super().__init__()
        check_factor_shapes(left, shared.right, shared.core)
        (self.out_features, self.rank), self.in_features = left.shape, shared.right.shape[1]
        self.left = nn.Parameter(left, requires_grad=False)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.member = member
        if member == 0:
            self.owned = shared
        # torch does not register modules inside a tuple, but a deep copy follows the reference.
        self._shared = (shared,)

    @property
    def shared(self) -> SharedProduct:
        """The product of the stack."""
        return self._shared[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return nn.functional.linear(self.shared(x, self.member), self.left, self.bias)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def check_factor_shapes(left: Tensor, right: Tensor, core: Tensor | None) -> None:
    """Raise `ValueError` unless the factors chain as (m, r) [(r, r)] (r, n)."""
    rank = left.shape[-1]
    core_fits = core is None or tuple(core.shape) == (rank, rank)
    if left.ndim != 2 or right.ndim != 2 or right.shape[0] != rank or not core_fits:
        shapes = [tuple(factor.shape) for factor in (left, core, right) if factor is not None]
        raise ValueError(f"factors must chain as (m, r) [(r, r)] (r, n), but got {shapes}")
