"""The Tucker factors of a fused expert tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TuckerFactors"]


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """A tensor of shape (experts, out_features, in_features) as a core and a factor for each mode.

    W[e, o, i] ~ sum over a, b, c of core[a, b, c] experts[e, a] left[o, b] right[c, i]. A mode without a factor is in
    the core at its full size.

    Attributes:
        core: Shape (r_e, r_o, r_i).
        experts: Shape (experts, r_e), or None where r_e = experts.
        left: Shape (out_features, r_o), or None where r_o = out_features.
        right: Shape (r_i, in_features), or None where r_i = in_features.
    """

    core: Tensor
    experts: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def __post_init__(self) -> None:
        kept = (
            self.core.shape[0] if self.experts is None else self.experts.shape[-1],
            self.core.shape[1] if self.left is None else self.left.shape[-1],
            self.core.shape[2] if self.right is None else self.right.shape[0],
        )
        matrices = [factor for factor in (self.experts, self.left, self.right) if factor is not None]
        if self.core.ndim != 3 or tuple(self.core.shape) != kept or any(factor.ndim != 2 for factor in matrices):
            shapes = [None if t is None else tuple(t.shape) for t in (self.core, self.experts, self.left, self.right)]
            raise ValueError(f"factors must chain as (a, b, c) (E, a) (m, b) (c, n), but got {shapes}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out_features, in_features) of the tensor that they stand for."""
        return (
            self.core.shape[0] if self.experts is None else self.experts.shape[0],
            self.core.shape[1] if self.left is None else self.left.shape[0],
            self.core.shape[2] if self.right is None else self.right.shape[1],
        )

    @property
    def ranks(self) -> tuple[int, int, int]:
        """Multilinear ranks (r_e, r_o, r_i)."""
        a, b, c = self.core.shape
        return (a, b, c)

    def product(self) -> Tensor:
        """The approximated weight, shape (experts, out_features, in_features)."""
        weight = self.core
        if self.experts is not None:
            weight = torch.einsum("ea,aoi->eoi", self.experts, weight)
        if self.left is not None:
            weight = self.left @ weight
        return weight if self.right is None else weight @ self.right

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TuckerFactors:
        """The same on another device and in another dtype."""
        moved = [None if t is None else t.to(device, dtype) for t in (self.core, self.experts, self.left, self.right)]
        return TuckerFactors(*moved)  # type: ignore[arg-type]  # the core is never None
