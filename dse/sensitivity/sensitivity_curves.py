"""Predicted divergence of tensors and blocks at ranks between the measured ones.

KL divergence is quadratic in a small change of the model, so the divergence of one tensor grows about in proportion to
the squared error of its outputs. The factor between the two depends on the tensor, and one measurement determines it.
The leading columns matter slightly more than their share of the error, hence an exponent somewhat above 1.
docs/figures.md reports how well this predicts ranks that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.cost import factor_parameters, largest_rank
from dse.design_point import TensorChoice
from dse.errors import AllocationError
from dse.model_parts import Matrix
from dse.sensitivity.allocation import allocate
from dse.sensitivity.option import Choices, Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = [
    "BlockCurve",
    "TensorCurve",
    "best_split",
    "profiled_limit",
    "profiled_ranks",
    "rank_of_kept_fraction",
    "split_table",
]

_EXPONENT = 1.15
"""Of the squared error; fitted on SmolLM2 (35 tensors of 5 layers, kept fractions 0.1 to 0.75 predicted from 0.5)."""
_MIN_DIVERGENCE = 1e-9  # nats: keeps the order of ranks even if the measured divergence is 0


@dataclass(frozen=True, eq=False)
class TensorCurve:
    """Predicted divergence of one tensor under one method.

    Attributes:
        tensor: The tensor or stack.
        method: Decomposition method.
        errors: Relative squared error of its outputs at ranks 0 to the largest, non-increasing.
        rank: The rank at which the divergence was measured.
        divergence: The measured divergence at `rank`, nats per token.
        form: Form of the factors, as in `TensorChoice.form`. The divergence at a rank does not depend on it.
    """

    tensor: Matrix
    method: str
    errors: NDArray[np.float64]
    rank: int
    divergence: float
    form: str = ""

    def at(self, rank: int) -> float:
        """Predicted divergence at a rank from 0 to the largest, nats per token."""
        ratio = float(self.errors[rank]) / float(self.errors[self.rank])
        return max(self.divergence, _MIN_DIVERGENCE) * math.pow(ratio, _EXPONENT)

    def choice(self, rank: int) -> tuple[str, TensorChoice]:
        """The (name, choice) pair of this tensor at a rank."""
        return self.tensor.name, TensorChoice(self.method, rank, form=self.form)


@dataclass(frozen=True)
class BlockCurve:
    """Corrects the sum of a block's tensor curves by measurements of the whole block.

    The tensors of a block compensate or amplify each other's errors, more so at lower ranks. The ratio of measured to
    predicted divergence is interpolated between the measurements on logarithmic scales, and constant beyond them.

    Attributes:
        predicted: Sums of the tensor curves at the measured splits, ascending.
        measured: Measured divergences of these splits, nats per token.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> BlockCurve:
        """The curve through (predicted, measured) pairs in any order."""
        ordered = sorted((max(p, _MIN_DIVERGENCE), max(m, _MIN_DIVERGENCE)) for p, m in pairs)
        return cls(tuple(p for p, _ in ordered), tuple(m for _, m in ordered))

    def at(self, predicted: float) -> float:
        """Corrected divergence of a split whose tensor curves sum to `predicted`, nats per token."""
        if not self.predicted:
            return predicted
        at = math.log(max(predicted, _MIN_DIVERGENCE))
        known, ratios = np.log(self.predicted), np.log(self.measured) - np.log(self.predicted)
        return predicted * math.exp(float(np.interp(at, known, ratios)))


def profiled_limit(tensor: Matrix, method: str, forms: Sequence[str]) -> int:
    """The largest rank of a tensor or stack over these forms of its factors."""
    return max(largest_rank(tensor, TensorChoice(method, 1, form=form)) for form in forms)


def profiled_ranks(tensor: Matrix, method: str, multiple: int, form: str = "") -> tuple[int, ...]:
    """Multiples of `multiple` that save parameters; the largest rank if it is smaller than one multiple."""
    limit = profiled_limit(tensor, method, (form,))
    ranks = tuple(
        rank
        for rank in range(multiple, limit + 1, multiple)
        if factor_parameters(tensor, TensorChoice(method, rank, form=form)) < tensor.parameters
    )
    return ranks or (min(limit, multiple),)


def rank_of_kept_fraction(tensor: Matrix, method: str, fraction: float, multiple: int, form: str = "") -> int:
    """The largest profiled rank that keeps at most this fraction of the tensor's parameters, or the smallest rank."""
    budget = math.floor(fraction * tensor.parameters)
    ranks = profiled_ranks(tensor, method, multiple, form)
    within = [rank for rank in ranks if factor_parameters(tensor, TensorChoice(method, rank, form=form)) <= budget]
    return within[-1] if within else ranks[0]


def split_table(curves: Sequence[TensorCurve], multiple: int) -> SensitivityTable:
    """A table with one unit per tensor of a block, at every profiled rank."""
    units = []
    for curve in curves:
        options = [Option((), curve.tensor.parameters, 0.0)]
        for rank in profiled_ranks(curve.tensor, curve.method, multiple, curve.form):
            choice = curve.choice(rank)
            parameters = factor_parameters(curve.tensor, choice[1])
            options.append(Option((choice,), parameters, curve.at(rank), is_measured=False))
        units.append(Unit(curve.tensor.name, curve.tensor.layer, curve.tensor.role, tuple(options)))
    return SensitivityTable(tuple(units), sum(curve.tensor.parameters for curve in curves))


def best_split(table: SensitivityTable, kept_fraction: float) -> Choices | None:
    """The ranks of a block's tensors with the least predicted divergence at a kept fraction of the block.

    Args:
        table: The output of `split_table`.
        kept_fraction: Factor parameters / dense parameters of the block.

    Returns:
        The choices; tensors without one stay dense. None if even the smallest ranks keep more.
    """
    try:
        return allocate(table, reduction=1 - kept_fraction).point.choices
    except AllocationError:
        return None
