"""The fused weight of all routed experts of a layer, and the cost of its Tucker decomposition (no torch).

A fused weight has shape (experts, out_features, in_features). A Tucker decomposition with ranks (r_e, r_o, r_i)
consists of a core of that shape and one factor per mode. A full-rank mode has no factor: its square orthogonal matrix
is multiplied into the core. One number r sets both matrix ranks, r_o = min(r, out_features) and
r_i = min(r, in_features). The expert mode stays at full rank unless the expert rank r_e is given. With E experts,
m = out_features and n = in_features the number of parameters is

    E r^2 + r(m + n)              for r < min(m, n) and a full expert mode: one small core per expert,
    r_e r^2 + r(m + n) + E r_e    with an expert factor: r_e cores, mixed by the expert's row of the factor.

The break-even rank is the largest r at which this is at most Emn. For many experts with m = n it approaches n, because
all experts share the two large factors; an expert decomposed on its own breaks even at mn/(m + n) = n/2. FLOPs break
even at a lower rank than parameters, because one of the factors is applied once per chosen expert.

With k chosen experts, a token costs one product with the factor on the shared side, k products with the other factor,
and k cores. With an expert factor it costs all r_e cores, independent of k (`dse.decomposition.expert_modules`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["EXPERT_ROLES", "ExpertTensor"]

EXPERT_ROLES = ("expert_gate_up", "expert_down")
"""Roles of fused expert tensors, in the order of the forward pass."""


@dataclass(frozen=True)
class ExpertTensor:
    """The fused weight of all routed experts of a layer, which can be replaced by its Tucker decomposition.

    Attributes:
        name: Canonical name, `layers.<layer>.<role>`.
        module: Path of the experts' module in the Hugging Face model, for example `model.layers.3.mlp.experts`.
        parameter: Name of the parameter in that module, for example `gate_up_proj`.
        layer: 0-based index of the layer.
        role: `expert_gate_up` or `expert_down`.
        experts: Number of routed experts.
        out_features: Rows of one expert's weight.
        in_features: Columns of one expert's weight.
        experts_per_token: Number of experts that the router chooses per token.
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
        """Whether a token's chosen experts share their input (gate_up); if not, their outputs are added (down)."""
        return self.role == "expert_gate_up"

    def ranks(self, rank: int, expert_rank: int = 0) -> tuple[int, int, int]:
        """Multilinear ranks (experts, out, in) for the ranks of a design point; expert rank 0 means full rank.

        The rank of a truncated mode is at most the product of the other two, which matters for few experts and a large
        rank.
        """
        of_experts, m, n = expert_rank or self.experts, self.out_features, self.in_features
        of_out = m if rank >= m else min(rank, of_experts * min(rank, n))
        of_in = n if rank >= n else min(rank, of_experts * min(rank, m))
        return (min(expert_rank, of_out * of_in) or self.experts, of_out, of_in)

    def factor_parameters(self, rank: int, expert_rank: int = 0) -> int:
        """Parameters of the core and of one factor per truncated mode."""
        of_experts, of_out, of_in = self.ranks(rank, expert_rank)
        factors = [
            size * kept for size, kept in zip(self.shape, (of_experts, of_out, of_in), strict=True) if kept < size
        ]
        return of_experts * of_out * of_in + sum(factors)

    def factor_matmul_parameters(self, rank: int, expert_rank: int = 0) -> int:
        """Multiplications per token in the module that replaces the experts."""
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
        """Largest rank (at least 1) whose decomposition has at most `parameters` parameters.

        The count drops slightly at the rank where a mode becomes full, because its factor is no longer needed. The
        search stops at the first rank that is too large, and excludes the rank at which nothing is decomposed.
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
        """Largest rank whose decomposition has no more parameters than the weight (at least 1)."""
        return self.largest_rank(self.parameters, expert_rank)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Largest number in [low, high] for which `fits` holds, by bisection; `low` is assumed to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
