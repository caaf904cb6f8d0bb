"""Low-rank factors of matrices and Tucker factors of fused expert tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dse.decomposition.expert_modules import TuckerExpertWeight
from dse.decomposition.low_rank_modules import LowRankLinear, NormThenFactor, StackedLinear, check_factor_shapes
from dse.decomposition.pivoted_module import PivotedLinear
from dse.model_parts import TensorStack
from dse.topology import Topology

__all__ = ["LowRankFactors", "TuckerFactors", "applied_factors", "as_matrix", "expert_factors_of", "factors_of"]


@dataclass(frozen=True, eq=False)
class LowRankFactors:
    """Factors of a matrix: `weight` ~ left (core) right.

    Attributes:
        left: Shape (out_features, rank).
        right: Shape (rank, in_features).
        core: Shape (rank, rank); None if it is merged into another factor.
    """

    left: Tensor
    right: Tensor
    core: Tensor | None = None

    def __post_init__(self) -> None:
        check_factor_shapes(self.left, self.right, self.core)

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return self.left.shape[1]

    def product(self) -> Tensor:
        """The approximated weight, shape (out_features, in_features)."""
        left = self.left if self.core is None else self.left @ self.core
        return left @ self.right

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRankFactors:
        """Copy to another device and dtype."""
        core = None if self.core is None else self.core.to(device, dtype)
        return LowRankFactors(self.left.to(device, dtype), self.right.to(device, dtype), core)

    def truncated(self, rank: int) -> LowRankFactors:
        """The leading `rank` components.

        Every method orders components by importance, so this equals the method's own result at that rank.
        """
        core = None if self.core is None else self.core[:rank, :rank]
        return LowRankFactors(self.left[:, :rank], self.right[:rank], core)


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """Tucker factors of a tensor of shape (experts, out_features, in_features).

    W[e, o, i] ~ sum over a, b, c of core[a, b, c] experts[e, a] left[o, b] right[c, i]. A mode without a factor has its
    full size in the core.

    Attributes:
        core: Shape (r_e, r_o, r_i).
        experts: Shape (experts, r_e), or None if r_e = experts.
        left: Shape (out_features, r_o), or None if r_o = out_features.
        right: Shape (r_i, in_features), or None if r_i = in_features.
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
        """Shape (experts, out_features, in_features) of the approximated tensor."""
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
        """Copy to another device and dtype."""
        return TuckerFactors(**{name: t.to(device, dtype) for name, t in vars(self).items() if t is not None})


def factors_of(module: LowRankLinear | StackedLinear | PivotedLinear) -> LowRankFactors:
    """The factors in a low-rank module; for a member of a stack, the right factor and core of the whole stack.

    Of pivoted factors one is the independent columns or rows, and the other an identity beside the combinations.
    """
    if isinstance(module, PivotedLinear):
        return _factors_of_pivoted(module)
    shared = module.shared if isinstance(module, StackedLinear) else module
    return _factors(module.left, shared.right, shared.core)


def applied_factors(model: nn.Module, topology: Topology, name: str) -> dict[str, LowRankFactors]:
    """The factors of a tensor, or of each member of a stack, in a model to which a point is applied.

    Args:
        model: The model with the point applied.
        topology: Its topology.
        name: Name of a tensor or stack of the point.

    Returns:
        Module path to the factors of its weight; members of a stack share their right factor and core.
    """
    matrix = topology.matrix(name)
    before = model.get_submodule(matrix.norm) if isinstance(matrix, TensorStack) and matrix.norm else None
    found = {}
    for path in matrix.modules:
        module = model.get_submodule(path)
        if isinstance(before, NormThenFactor):
            found[path] = _factors(module, before.right, before.core)
        else:
            assert isinstance(module, (LowRankLinear, PivotedLinear, StackedLinear))  # noqa: S101 - inserted by surgery
            found[path] = factors_of(module)
    return found


def _factors_of_pivoted(module: PivotedLinear) -> LowRankFactors:
    pivots, combinations = _weight(module.pivots), _weight(module.combinations)
    identity = torch.eye(module.rank, dtype=pivots.dtype, device=pivots.device)
    if module.of_columns:
        return LowRankFactors(pivots, torch.cat((identity, combinations), 1)[:, module.order.argsort()])
    return LowRankFactors(torch.cat((identity, combinations))[module.order], pivots)


def _factors(left: nn.Module, right: nn.Module, core: nn.Module | None) -> LowRankFactors:
    return LowRankFactors(_weight(left), _weight(right), None if core is None else _weight(core))


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)  # noqa: S101 - narrows the type of a linear module
    return module.weight.detach()


def expert_factors_of(module: TuckerExpertWeight) -> TuckerFactors:
    """The Tucker factors in a module."""
    return TuckerFactors(**{name: parameter.data for name, parameter in module.named_parameters()})


def as_matrix(module: nn.Module) -> Tensor:
    """The module's weight as (out_features, in_features); GPT-2's Conv1D stores the transpose."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - narrows the type; surgery checked the module
    return weight.T if type(module).__name__ == "Conv1D" else weight
