"""From a rank grid in a search-space file to the rank of one tensor: snapped, and never above break-even."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from dse.config import RankConfig
from dse.cost import factor_parameters, has_core, largest_rank
from dse.design_point import TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.topology import Decomposable

__all__ = ["level_count", "method_for", "rank_at", "saved_parameters"]


def level_count(grid: RankConfig) -> int:
    """Rank levels that the file lists (dense not counted)."""
    return len(grid.absolute or grid.kept_fractions or ())


def method_for(part: Decomposable, method: str) -> str:
    """The method that decomposes this part where a space says `method`: fused expert tensors know `tucker` alone."""
    return "tucker" if isinstance(part, ExpertTensor) else method


def rank_at(grid: RankConfig, index: int, tensor: Decomposable, method: str) -> int:
    """Rank of a tensor, stack or fused expert tensor (by `tucker`, its expert mode full) at a level of the grid.

    Absolute ranks are capped at break-even. A kept fraction f asks for the largest rank whose factors hold at most f of
    the dense parameters. Either is rounded down to the grid's multiple, but not below one multiple (or break-even, if
    that is smaller).
    """
    limit = largest_rank(tensor, method_for(tensor, method))
    if grid.absolute is not None:
        rank = min(sorted(grid.absolute, reverse=True)[index], limit)
    else:
        assert grid.kept_fractions is not None  # noqa: S101 - the schema allows exactly one grid
        # As written: 0.29 of 100 is 29, where the float product is 28.999999999999996.
        fraction = Fraction(repr(sorted(grid.kept_fractions, reverse=True)[index]))
        rank = _rank_within(math.floor(fraction * tensor.parameters), tensor, method)
    multiple = grid.settled_multiple
    return min(max(rank // multiple * multiple, multiple), limit)


def _rank_within(budget: int, tensor: Decomposable, method: str) -> int:
    """Largest rank whose factors hold no more than so many parameters."""
    if isinstance(tensor, ExpertTensor):
        return tensor.largest_rank(budget)
    total = tensor.out_features + tensor.in_features
    return (math.isqrt(total**2 + 4 * budget) - total) // 2 if has_core(method) else budget // total


def saved_parameters(tensors: Iterable[Decomposable], choices: Iterable[TensorChoice]) -> int:
    """Parameters that these choices remove."""
    return sum(t.parameters - factor_parameters(t, c) for t, c in zip(tensors, choices, strict=True))
