"""What every decomposition asks of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from dse.errors import NonFiniteError, RankError

__all__ = ["check_finite", "check_rank"]


def check_rank(weight: Tensor, rank: int) -> None:
    """Refuse a rank outside 1 <= rank <= min(weight.shape), and weights that are not finite.

    Raises:
        RankError: The rank lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.
    """
    largest = min(weight.shape)
    if not 1 <= rank <= largest:
        raise RankError(
            f"`1 <= rank <= {largest}` must hold for a weight of {weight.shape[0]} x {weight.shape[1]},"
            f" but got rank={rank}; choose one inside"
        )
    check_finite(weight)


def check_finite(weight: Tensor) -> None:
    """Refuse weights that are not finite.

    Raises:
        NonFiniteError: The weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"a weight must be finite to be decomposed, but one of {' x '.join(map(str, weight.shape))} holds"
            " NaN or infinity; check the checkpoint"
        )
