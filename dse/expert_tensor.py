"""Routed experts that a model holds as one tensor, and what its Tucker decomposition costs: values only, no torch.

A fused weight has shape (experts, out_features, in_features). A Tucker decomposition of ranks (r_e, r_o, r_i) is a core
of that shape and a factor for each mode. A mode of full rank has no factor: a square orthogonal matrix would only cost,
so it is multiplied into the core. One number r says both matrix ranks, r_o = min(r, out_features) and
r_i = min(r, in_features); the expert mode is full unless a second number says otherwise. With E experts,
m = out_features and n = in_features the parameters are

    E r^2 + r(m + n)                          r < min(m, n), expert mode full: a small core for each expert,
    r_e r^2 + r(m + n) + E r_e                r_e cores, mixed by each expert's row of the expert factor,

and the break-even rank solves them against Emn. For many experts of m = n it comes close to n, while an expert
decomposed alone breaks even at mn/(m + n) = n/2: the two large factors are shared by all experts. FLOPs break even
earlier than parameters, since one of the factors is applied once for each chosen expert.

A token pays for the shared factor on its own side once, for the other once for each of its k chosen experts, and for k
cores; with an expert factor it pays for all r_e cores instead, whatever k is (`dse.decomposition.expert_modules`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["EXPERT_ROLES", "ExpertTensor"]

EXPERT_ROLES = ("expert_gate_up", "expert_down")
"""Roles of fused expert tensors, in the order of the forward pass."""


@dataclass(frozen=True)
class ExpertTensor:
    """One fused weight of all routed experts of a layer, which may be replaced by its Tucker decomposition.

    Attributes:
        name: Canonical name, `layers.<layer>.<role>`.
        module: Path of the experts' module in the Hugging Face model, for example `model.layers.3.mlp.experts`.
        parameter: Name of its parameter there, for example `gate_up_proj`.
        layer: 0-based index of the layer.
        role: `expert_gate_up` or `expert_down`.
        experts: Number of routed experts.
        out_features: Rows of one expert's weight.
        in_features: Columns of one expert's weight.
        experts_per_token: Experts that the router chooses for a token.
    """

    name: str
    module: str
    parameter: str
    layer: int
    role: str
    experts: int
    out_features: int
    in_features: int
    experts_per_token: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out_features, in_features)."""
        return (self.experts, self.out_features, self.in_features)

    @property
    def parameters(self) -> int:
        """Entries of the weight."""
        return self.experts * self.out_features * self.in_features

    @property
    def matmul_parameters(self) -> int:
        """Entries that multiply one token: those of its chosen experts."""
        return self.experts_per_token * self.out_features * self.in_features

    @property
    def reads_token(self) -> bool:
        """Whether a token's chosen experts all read the same input; otherwise their outputs are added up."""
        return self.role == "expert_gate_up"

    def ranks(self, rank: int, expert_rank: int = 0) -> tuple[int, int, int]:
        """Multilinear ranks (experts, out, in) of a design point's numbers; expert rank 0 means full.

        A mode that is truncated keeps no more than the other two can fill: with few experts and a large rank less.
        """
        of_experts, m, n = expert_rank or self.experts, self.out_features, self.in_features
        of_out = m if rank >= m else min(rank, of_experts * min(rank, n))
        of_in = n if rank >= n else min(rank, of_experts * min(rank, m))
        return (min(expert_rank, of_out * of_in) or self.experts, of_out, of_in)

    def factor_parameters(self, rank: int, expert_rank: int = 0) -> int:
        """Parameters of the core and of a factor for each mode whose rank is not full."""
        of_experts, of_out, of_in = self.ranks(rank, expert_rank)
        factors = [
            size * kept for size, kept in zip(self.shape, (of_experts, of_out, of_in), strict=True) if kept < size
        ]
        return of_experts * of_out * of_in + sum(factors)

    def factor_matmul_parameters(self, rank: int, expert_rank: int = 0) -> int:
        """Multiplications for one token, as the module that stands in computes them."""
        of_experts, of_out, of_in = self.ranks(rank, expert_rank)
        chosen = self.experts_per_token
        rights, lefts = (1, chosen) if self.reads_token else (chosen, 1)
        right = rights * of_in * self.in_features if of_in < self.in_features else 0
        left = lefts * of_out * self.out_features if of_out < self.out_features else 0
        if of_experts == self.experts:
            return right + chosen * of_out * of_in + left
        mixed = chosen * of_experts * (of_out if self.reads_token else of_in)
        return right + of_experts * of_out * of_in + mixed + left

    def largest_rank(self, parameters: int, expert_rank: int = 0) -> int:
        """The rank (at least 1) up to which the decomposition holds no more than so many parameters.

        Where a mode becomes full its factor goes, so the count falls a little there; ranks beyond one that is too large
        are not looked for. The rank at which nothing is decomposed is none.
        """

        def fits(rank: int) -> bool:
            return self.factor_parameters(rank, expert_rank) <= parameters

        low, high = sorted((self.out_features, self.in_features))
        last = high if expert_rank else high - 1
        found = 0
        for end in sorted({min(low - 1, last), min(high - 1, last), last}):
            found = _largest(fits, found, end)
            if found < end:
                break
        return max(1, found)

    def break_even_rank(self, expert_rank: int = 0) -> int:
        """Largest rank whose decomposition holds no more parameters than the weight (at least 1)."""
        return self.largest_rank(self.parameters, expert_rank)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low` (taken as fitting) to `high` that fits; none above one that does not fit does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
