"""Modules that replace dense linear layers by low-rank factors. Each factor is a plain `torch.nn.Linear`.

Inference engines replace every `nn.Linear` by their own linear layer (quantised, or split over devices), so they do the
same with factors. Exports copy this file's classes into their modelling file (`dse.export.modelling_code`), so it
imports torch only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LowRankLinear",
    "NormThenFactor",
    "SharedProduct",
    "StackedLinear",
    "check_factor_shapes",
    "linear_from",
]


class LowRankLinear(nn.Module):
    """Linear layer with a factorised weight: `y = ((x R^T) C^T) L^T + b`; C is absent unless a core is kept.

    One token costs 2r(m + n) FLOPs (plus 2r^2 for the core) instead of 2mn. Below the break-even rank that is less
    work, but in two or three small kernels instead of one, so fewer parameters do not guarantee a faster layer.

    The factors are the submodules `right`, `core` (None if absent) and `left`, which holds the bias.

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
        self.right = linear_from(right)
        self.core = None if core is None else linear_from(core)
        self.left = linear_from(left, bias)

    @property
    def bias(self) -> Tensor | None:
        """The bias, shape (out_features,), or None."""
        return self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden = self.right(x)
        if self.core is not None:
            hidden = self.core(hidden)
        output: Tensor = self.left(hidden)
        return output

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class NormThenFactor(nn.Module):
    """A norm followed by the right factor (and core) of the stack that is its only reader.

    The members of the stack then are plain linear layers of the left factor: `y = (norm(x) R^T) L^T + b`. Engines fuse
    them as they fuse dense projections.

    Args:
        norm: The norm before the block; it is used unchanged.
        right: Shape (rank, in_features).
        core: Shape (rank, rank), or None.
    """

    def __init__(self, norm: nn.Module, right: Tensor, core: Tensor | None = None) -> None:
        super().__init__()
        check_factor_shapes(right.T, right, core)
        self.norm = norm
        self.right = linear_from(right)
        self.core = None if core is None else linear_from(core)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., rank)."""
        hidden: Tensor = self.right(self.norm(x))
        if self.core is not None:
            hidden = self.core(hidden)
        return hidden


class SharedProduct(nn.Module):
    """The product `x R^T` (and `C^T`) that the members of a stack share, computed once per forward pass.

    It serves stacks that are not the only readers of a norm (see `NormThenFactor`).

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
        self.right = linear_from(right)
        self.core = None if core is None else linear_from(core)
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
        hidden: Tensor = self.right(x)
        if self.core is not None:
            hidden = self.core(hidden)
        return hidden

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without a held product."""
        return {**vars(self), "_held": None}

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return f"members={self.members}"


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
        check_factor_shapes(left, shared.right.weight, None if shared.core is None else shared.core.weight)
        (self.out_features, self.rank), self.in_features = left.shape, shared.right.in_features
        self.left = linear_from(left, bias)
        self.member = member
        if member == 0:
            self.owned = shared
        # torch does not register modules inside a tuple, but a deep copy follows the reference.
        self._shared = (shared,)

    @property
    def bias(self) -> Tensor | None:
        """The bias, shape (out_features,), or None."""
        return self.left.bias

    @property
    def shared(self) -> SharedProduct:
        """The product of the stack."""
        return self._shared[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = self.left(self.shared(x, self.member))
        return output

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


def linear_from(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer that holds these tensors; nothing is copied or initialised.

    Args:
        weight: Shape (out_features, in_features).
        bias: Shape (out_features,), or None. A parameter is reused, so that a dense module's bias exists only once.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)  # without `nn.Linear.__init__`, which would fill the weight with random numbers
    linear.out_features, linear.in_features = weight.shape
    linear.register_parameter("weight", _parameter(weight))
    linear.register_parameter("bias", None if bias is None else _parameter(bias))
    return linear


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
