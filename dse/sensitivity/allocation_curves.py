"""Ranks for a budget from divergence curves: an allocation over every rank of every tensor.

If the divergence of each tensor is known at every rank, and divergences add up, the optimal ranks share one Lagrange
multiplier: each tensor minimises divergence + rate * parameters on its own, and the rate is raised until the budget is
met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.design_point import PIVOTED, DesignPoint, TensorChoice
from dse.errors import AllocationError
from dse.model_parts import Matrix
from dse.topology import Topology

__all__ = ["CurveAllocation", "allocate_curves"]

_HALVINGS = 60  # of the interval of rates


@dataclass(frozen=True)
class CurveAllocation:
    """A point of minimal expected divergence.

    Attributes:
        point: The ranks.
        divergence: Expected divergence, in the unit of the curves.
        reduction: 1 - parameters / dense parameters.
    """

    point: DesignPoint
    divergence: float
    reduction: float


@dataclass(frozen=True)
class _Curve:
    """The choices of one matrix: dense, or one of these ranks, in ascending order."""

    name: str
    ranks: NDArray[np.int64]
    parameters: NDArray[np.int64]
    divergence: NDArray[np.float64]
    dense_parameters: int

    def best(self, rate: float) -> int:
        """Index of the rank with the smallest divergence + rate * parameters; -1 for dense."""
        price = self.divergence + rate * self.parameters
        index = int(price.argmin())
        return index if price[index] < rate * self.dense_parameters else -1

    def saved(self, index: int) -> int:
        """Parameters removed at this index."""
        return 0 if index < 0 else self.dense_parameters - int(self.parameters[index])

    def divergence_at(self, index: int) -> float:
        """Divergence at this index; 0 for dense."""
        return 0.0 if index < 0 else float(self.divergence[index])


def allocate_curves(
    topology: Topology,
    curves: Mapping[str, NDArray[np.float64]],
    reduction: float,
    *,
    method: str = "fisher_svd",
    form: str = "",
    multiple: int = 1,
) -> CurveAllocation:
    """Ranks of minimal total divergence for a reduction.

    Args:
        curves: Name of each tensor or stack that may be decomposed (no tensor twice) to its divergence at ranks 0, 1,
            ... up to full rank, non-increasing.
        reduction: Smallest reduction, as a share of all parameters of the model; above 0.
        method: Method of the choices.
        form: Form of the factors, `pivoted` or "" for two; pivoted ones apply to single tensors.
        multiple: Ranks are multiples of this; a tensor whose break-even rank is smaller stays dense.

    Returns:
        The allocation. By duality no allocation with as few parameters has less divergence, except for the ranks that
        are raised at the end to use up the budget.

    Raises:
        AllocationError: The smallest ranks do not reach the reduction.

    Source: Lagrangian relaxation of the multiple-choice knapsack (Everett 1963).
    """
    rows = [row for name in curves if (row := _curve(topology.matrix(name), curves[name], form, multiple)) is not None]
    wanted = reduction * topology.parameters_dense
    most = sum(row.saved(0) for row in rows)
    if most < wanted or reduction <= 0:
        raise AllocationError(
            f"`0 < reduction <= {most / topology.parameters_dense:.4f}` must hold for these {len(rows)} tensors with"
            f" ranks in multiples of {multiple}, but got {reduction}; allow more tensors or ask for less"
        )
    chosen = _meet(rows, wanted)
    _raise_ranks(rows, chosen, sum(row.saved(i) for row, i in zip(rows, chosen, strict=True)) - wanted)
    pairs = [(row, index) for row, index in zip(rows, chosen, strict=True) if index >= 0]
    point = DesignPoint.of({row.name: TensorChoice(method, int(row.ranks[index]), form=form) for row, index in pairs})
    saved = sum(row.saved(index) for row, index in pairs)
    divergence = sum(row.divergence_at(index) for row, index in pairs)
    return CurveAllocation(point, divergence, saved / topology.parameters_dense)


def _curve(matrix: Matrix, divergence: NDArray[np.float64], form: str, multiple: int) -> _Curve | None:
    per_rank = sum(matrix.shape)
    last = min(matrix.shape) - 1 if form == PIVOTED else (matrix.parameters - 1) // per_rank
    ranks = np.arange(multiple, last + 1, multiple)
    if not len(ranks):
        return None
    parameters = ranks * per_rank - (ranks**2 if form == PIVOTED else 0)
    return _Curve(matrix.name, ranks, parameters, np.asarray(divergence, dtype=np.float64)[ranks], matrix.parameters)


def _meet(rows: list[_Curve], wanted: float) -> list[int]:
    """The choices at the smallest rate that saves enough, found by bisection."""

    def at(rate: float) -> tuple[list[int], int]:
        chosen = [row.best(rate) for row in rows]
        return chosen, sum(row.saved(index) for row, index in zip(rows, chosen, strict=True))

    # At the upper end any saving outweighs any divergence, so that every tensor takes its smallest rank.
    low, high = 0.0, 1.0 + max(float(row.divergence[0]) for row in rows)
    for _ in range(_HALVINGS):
        middle = high / 2 if low == 0 else (low * high) ** 0.5
        if at(middle)[1] >= wanted:
            high = middle
        else:
            low = middle
    return at(high)[0]


def _raise_ranks(rows: list[_Curve], chosen: list[int], slack: float) -> None:
    """Spend what was saved beyond the budget: raise the ranks that lower divergence most per parameter."""
    while True:
        best, best_gain = -1, 0.0
        for i, (row, index) in enumerate(zip(rows, chosen, strict=True)):
            if index < 0 or index + 1 >= len(row.ranks):
                continue
            cost = int(row.parameters[index + 1] - row.parameters[index])
            gain = (row.divergence_at(index) - row.divergence_at(index + 1)) / cost
            if cost <= slack and gain > best_gain:
                best, best_gain = i, gain
        if best < 0:
            return
        slack -= int(rows[best].parameters[chosen[best] + 1] - rows[best].parameters[chosen[best]])
        chosen[best] += 1
