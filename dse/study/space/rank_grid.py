"""From a rank grid in a search-space file to the rank of one tensor: snapped, and never above break-even."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from dse.config import RankConfig
from dse.cost import break_even_rank, factor_parameters, has_core
from dse.design_point import TensorChoice
from dse.topology import Matrix

__all__ = ["level_count", "rank_at", "saved_parameters"]


def level_count(grid: RankConfig) -> int:
    """Rank levels that the file lists (dense not counted)."""
    return len(grid.absolute or grid.kept_fractions or ())


def rank_at(grid: RankConfig, index: int, tensor: Matrix, method: str) -> int:
    """Rank of a tensor or stack at a level of the grid.

    Absolute ranks are capped at break-even. A kept fraction f asks for the largest rank whose factors hold at most f of
    the dense parameters. Either is rounded down to the grid's multiple, but not below one multiple (or break-even, if
    that is smaller).
    """
    limit = break_even_rank(*tensor.shape, core=has_core(method))
    if grid.absolute is not None:
        rank = min(sorted(grid.absolute, reverse=True)[index], limit)
    else:
        assert grid.kept_fractions is not None  # noqa: S101 - the schema allows exactly one grid
        # As written: 0.29 of 100 is 29, where the float product is 28.999999999999996.
        fraction = Fraction(repr(sorted(grid.kept_fractions, reverse=True)[index]))
        budget = math.floor(fraction * tensor.parameters)
        total = tensor.out_features + tensor.in_features
        rank = (math.isqrt(total**2 + 4 * budget) - total) // 2 if has_core(method) else budget // total
    return min(max(rank // grid.multiple * grid.multiple, grid.multiple), limit)


def saved_parameters(tensors: Iterable[Matrix], choices: Iterable[TensorChoice]) -> int:
    """Parameters that these choices remove."""
    return sum(t.parameters - factor_parameters(t, c) for t, c in zip(tensors, choices, strict=True))
