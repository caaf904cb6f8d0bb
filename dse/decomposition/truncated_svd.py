"""`svd`: the best approximation in the Frobenius norm."""

from __future__ import annotations

import torch
from torch import Tensor

from dse.decomposition.low_rank import LowRankFactors
from dse.decomposition.rank_check import check_rank

__all__ = ["truncated_svd"]


def truncated_svd(weight: Tensor, rank: int) -> LowRankFactors:
    """Best rank-`rank` approximation of `weight` in the Frobenius norm.

    Args:
        weight: Shape (out_features, in_features), floating point.
        rank: Columns kept, 1 <= rank <= min(weight.shape).

    Returns:
        Factors with left (out_features, rank) and right (rank, in_features) in float32; the singular values are
        absorbed in `left`, so the error of a truncation is the norm of the columns left out.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.

    Source: Eckart and Young (1936).
    """
    check_rank(weight, rank)
    left, singular_values, right = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    return LowRankFactors((left[:, :rank] * singular_values[:rank]).contiguous(), right[:rank].contiguous())
