"""The module that stands in for a dense weight, and the factors it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LowRankFactors", "LowRankLinear"]


@dataclass(frozen=True, eq=False)
class LowRankFactors:
    """Factors with `weight` ~ left (core) right.

    Attributes:
        left: Shape (out_features, rank).
        right: Shape (rank, in_features).
        core: Shape (rank, rank), or None where it is merged into a factor.
    """

    left: Tensor
    right: Tensor
    core: Tensor | None = None

    def __post_init__(self) -> None:
        rank = self.left.shape[-1]
        core_fits = self.core is None or tuple(self.core.shape) == (rank, rank)
        if self.left.ndim != 2 or self.right.ndim != 2 or self.right.shape[0] != rank or not core_fits:
            shapes = [tuple(t.shape) for t in (self.left, self.core, self.right) if t is not None]
            raise ValueError(f"factors must chain as (m, r) [(r, r)] (r, n), but got {shapes}")

    @property
    def rank(self) -> int:
        """Columns of `left`."""
        return self.left.shape[1]

    def product(self) -> Tensor:
        """The approximated weight, shape (out_features, in_features)."""
        left = self.left if self.core is None else self.left @ self.core
        return left @ self.right

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRankFactors:
        """The same on another device and in another dtype."""
        core = None if self.core is None else self.core.to(device, dtype)
        return LowRankFactors(self.left.to(device, dtype), self.right.to(device, dtype), core)

    def truncated(self, rank: int) -> LowRankFactors:
        """The leading `rank` columns; every method here orders them by importance, so this is its own rank-r answer."""
        core = None if self.core is None else self.core[:rank, :rank]
        return LowRankFactors(self.left[:, :rank], self.right[:rank], core)


class LowRankLinear(nn.Module):
    """Linear layer with a factorised weight: `y = ((x R^T) C^T) L^T + b`, C absent unless a core is kept.

    A token costs 2r(m + n) FLOPs (and 2r^2 for the core) instead of 2mn, and as many parameters: less work below the
    break-even rank, but two or three smaller kernels in place of one, which is why fewer parameters need not be faster.

    Args:
        left: Shape (out_features, rank).
        right: Shape (rank, in_features).
        bias: Shape (out_features,), or None.
        core: Shape (rank, rank), or None.

    Source: Moar et al. (2024), figure 2, for the three-layer form with the Tucker core kept.
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None, core: Tensor | None = None) -> None:
        super().__init__()
        LowRankFactors(left, right, core)  # the shapes must chain
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.core = None if core is None else nn.Parameter(core, requires_grad=False)
        # The dense module's own bias parameter is taken over, not copied: undoing must not find two of them.
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.left.shape[0]

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns kept."""
        return self.left.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden = functional.linear(x, self.right)
        if self.core is not None:
            hidden = functional.linear(hidden, self.core)
        return functional.linear(hidden, self.left, self.bias)

    def factors(self) -> LowRankFactors:
        """The module's weights as factors."""
        return LowRankFactors(self.left.data, self.right.data, None if self.core is None else self.core.data)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        core = ", core" if self.core is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{core}"


def as_matrix(module: nn.Module) -> Tensor:
    """The module's weight as (out_features, in_features); GPT-2's Conv1D stores it transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - narrows the type; surgery checked the module's kind
    return weight.T if type(module).__name__ == "Conv1D" else weight
