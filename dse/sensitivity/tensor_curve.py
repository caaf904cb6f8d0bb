"""Damage of one tensor at every rank, from its truncation errors and one measurement.

KL divergence is quadratic in a small change of the model, so divergence grows about in proportion to the squared error of
the tensor's outputs; what a unit of error costs depends on the tensor and is what the measurement tells. Leading
columns carry a little more than their share of it, hence a power somewhat above one. How well that predicts ranks that
were not measured is told in docs/search.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.cost import break_even_rank, factor_parameters, has_core
from dse.design_point import TensorChoice
from dse.errors import AllocationError
from dse.sensitivity.allocation import allocate
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Matrix

__all__ = ["TensorCurve", "best_split", "rank_grid", "rank_of_kept_fraction"]

_POWER = 1.15
"""Of the squared error: fitted on SmolLM2 (35 tensors of 5 layers; kept fractions of 0.1 to 0.75 from that of 0.5)."""
_LEAST_DAMAGE = 1e-9  # nats: a measurement of nothing at all still orders ranks


@dataclass(frozen=True, eq=False)
class TensorCurve:
    """Predicted divergence of one tensor by one method.

    Attributes:
        tensor: Which, or which stack of tensors.
        method: Of its factors.
        errors: Relative squared error of its outputs at ranks 0 to break-even, not rising.
        rank: At which divergence was measured.
        divergence: Measured there, nats per token.
    """

    tensor: Matrix
    method: str
    errors: NDArray[np.float64]
    rank: int
    divergence: float

    def at(self, rank: int) -> float:
        """Predicted divergence at a rank from 0 to break-even, nats per token."""
        share = float(self.errors[rank]) / float(self.errors[self.rank])
        return max(self.divergence, _LEAST_DAMAGE) * math.pow(share, _POWER)

    def choice(self, rank: int) -> tuple[str, TensorChoice]:
        """This tensor at this rank, as a point has it."""
        return self.tensor.name, TensorChoice(self.method, rank)


def rank_grid(tensor: Matrix, method: str, multiple: int) -> tuple[int, ...]:
    """Ranks that are multiples and save parameters; break-even itself where it is below one multiple."""
    limit = break_even_rank(*tensor.shape, core=has_core(method))
    ranks = tuple(
        rank
        for rank in range(multiple, limit + 1, multiple)
        if factor_parameters(tensor, TensorChoice(method, rank)) < tensor.parameters
    )
    return ranks or (min(limit, multiple),)


def rank_of_kept_fraction(tensor: Matrix, method: str, fraction: float, multiple: int) -> int:
    """The largest rank of the grid that keeps at most this share of the tensor's parameters, or the smallest rank."""
    budget = math.floor(fraction * tensor.parameters)
    grid = rank_grid(tensor, method, multiple)
    within = [rank for rank in grid if factor_parameters(tensor, TensorChoice(method, rank)) <= budget]
    return within[-1] if within else grid[0]


def split_table(curves: Sequence[TensorCurve], multiple: int) -> SensitivityTable:
    """The tensors of a block as units of their own, at every rank of the grid."""
    units = []
    for curve in curves:
        ranks = rank_grid(curve.tensor, curve.method, multiple)
        options = [Option((), curve.tensor.parameters, 0.0)]
        for rank in ranks:
            choice = curve.choice(rank)
            options.append(
                Option((choice,), factor_parameters(curve.tensor, choice[1]), curve.at(rank), is_measured=False)
            )
        units.append(Unit(curve.tensor.name, curve.tensor.layer, curve.tensor.role, tuple(options)))
    return SensitivityTable(tuple(units), sum(curve.tensor.parameters for curve in curves))


def best_split(table: SensitivityTable, parameter_ratio: float) -> tuple[tuple[str, TensorChoice], ...] | None:
    """The ranks of a block's tensors of least predicted divergence that keep this share of its parameters.

    Args:
        table: Of `split_table`.
        parameter_ratio: Of the block's parameters, factors counted in place of what they replace.

    Returns:
        Choices; tensors that are not named stay dense. None where the smallest ranks keep more.
    """
    try:
        return allocate(table, reduction=1 - parameter_ratio).point.choices
    except AllocationError:
        return None
