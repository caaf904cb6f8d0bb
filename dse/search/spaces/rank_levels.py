"""Ranks of the levels of a space, and the parameters that points save, tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from dse.config import RankConfig
from dse.cost import factor_parameters, has_core, largest_rank
from dse.design_point import PIVOTED, DesignPoint, TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.model_parts import Decomposable, Mlp
from dse.topology import Topology

__all__ = [
    "choice_at",
    "level_count",
    "method_for",
    "nearest_method",
    "rank_at",
    "saved_by_tensor",
    "saved_in_parts",
    "saved_parameters",
    "width_levels",
]


def level_count(grid: RankConfig) -> int:
    """Number of rank levels in the space's `ranks`, without dense."""
    return len(grid.absolute or grid.kept_fractions or ())


def method_for(part: Decomposable, method: str) -> str:
    """The method that decomposes a part in a space of this method; fused expert tensors support `tucker` only."""
    return "tucker" if isinstance(part, ExpertTensor) else method


def choice_at(grid: RankConfig, index: int, tensor: Decomposable, method: str, form: str = "") -> TensorChoice:
    """The choice for a part at a level of the grid, in this form of factors; fused expert tensors have one form."""
    own = "" if isinstance(tensor, ExpertTensor) else form
    return TensorChoice(method_for(tensor, method), rank_at(grid, index, tensor, method, form), form=own)


def rank_at(grid: RankConfig, index: int, tensor: Decomposable, method: str, form: str = "") -> int:
    """Rank of a tensor, stack or fused expert tensor (with its expert mode at full rank) at a level of the grid.

    Absolute ranks are capped at break-even, those of pivoted factors below full rank. A kept fraction f yields the
    largest rank whose factors have at most f of the dense parameters. Either is rounded down to the grid's multiple,
    but not below one multiple, or below the cap if that is smaller.
    """
    form = "" if isinstance(tensor, ExpertTensor) else form
    limit = largest_rank(tensor, TensorChoice(method_for(tensor, method), 1, form=form))
    if grid.absolute is not None:
        rank = min(sorted(grid.absolute, reverse=True)[index], limit)
    else:
        # Exact decimal arithmetic: 0.29 of 100 is 29, but the float product is 28.999999999999996.
        fraction = Fraction(repr(sorted(grid.kept_fractions or (), reverse=True)[index]))
        rank = _rank_within(math.floor(fraction * tensor.parameters), tensor, method, form)
    multiple = grid.settled_multiple
    return min(max(rank // multiple * multiple, multiple), limit)


def width_levels(grid: RankConfig, mlp: Mlp) -> tuple[int, ...]:
    """Channels that an MLP keeps at each kept fraction of the grid, rounded as ranks are; distinct and below all."""
    multiple, found = grid.settled_multiple, []
    for fraction in sorted(grid.kept_fractions or (), reverse=True):
        kept = math.floor(Fraction(repr(fraction)) * mlp.channels)
        found.append(max(kept // multiple * multiple, multiple))
    return tuple(dict.fromkeys(kept for kept in found if kept < mlp.channels))


def _rank_within(budget: int, tensor: Decomposable, method: str, form: str) -> int:
    """Largest rank whose factors have at most `budget` parameters."""
    if isinstance(tensor, ExpertTensor):
        return tensor.largest_rank(budget)
    total = tensor.out_features + tensor.in_features
    if form == PIVOTED:  # r (m + n) - r^2 <= budget
        return (total - math.isqrt(max(total**2 - 4 * budget - 1, 0)) - 1) // 2
    return (math.isqrt(total**2 + 4 * budget) - total) // 2 if has_core(method) else budget // total


def saved_parameters(tensors: Iterable[Decomposable], choices: Iterable[TensorChoice]) -> int:
    """Number of parameters that these choices remove."""
    return sum(t.parameters - factor_parameters(t, c) for t, c in zip(tensors, choices, strict=True))


def saved_by_tensor(topology: Topology, point: DesignPoint) -> dict[str, float]:
    """Tensor name to the parameters that a point removes; a stack's are divided in proportion to its members' sizes."""
    saved: dict[str, float] = {}
    for name, choice in point:
        if choice.is_width:
            share = 1.0 - choice.rank / topology.mlp(name).channels
        elif choice.is_removal:
            share = 1.0
        else:
            part = topology.decomposable(name)
            share = 1.0 - factor_parameters(part, choice) / part.parameters
        saved |= {tensor: share * topology.decomposable(tensor).parameters for tensor in topology.tensors_of(name)}
    return saved


def saved_in_parts(topology: Topology, saved: Mapping[str, float], names: Iterable[str]) -> float:
    """Sum of `saved` over the tensors of these parts, each counted once."""
    tensors = {tensor for name in names for tensor in topology.tensors_of(name)}
    return sum(saved.get(tensor, 0.0) for tensor in tensors)


def nearest_method(point: DesignPoint, methods: Sequence[str]) -> int:
    """Index of the one of these methods that decomposes most tensors of the point; 0 if none does."""
    counts = Counter(choice.method for _, choice in point if choice.method in methods)
    return methods.index(counts.most_common(1)[0][0]) if counts else 0
