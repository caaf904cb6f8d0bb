"""Tucker decomposition of matrices, as in the paper, and of fused expert tensors. The only importer of tensorly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dse.decomposition.factors import LowRankFactors, TuckerFactors
from dse.decomposition.input_checks import check_finite, check_rank
from dse.errors import RankError

__all__ = ["tucker", "tucker_merged", "tucker_of_experts"]

_ITERATIONS = 20


def tucker(weight: Tensor, rank: int) -> LowRankFactors:
    """Tucker decomposition of a matrix: left factor, r x r core, right factor.

    For a matrix, the higher-order SVD is the SVD with both bases orthonormal and the singular values in the core. So
    the approximation equals that of `truncated_svd`, but the core stays a separate layer and costs r^2 more parameters
    and FLOPs, as in the paper. The leading columns and the leading block of the core are the decomposition at a smaller
    rank.

    Args:
        weight: Shape (out_features, in_features), floating point.
        rank: Columns kept on both sides, 1 <= rank <= min(weight.shape).

    Returns:
        Factors in float32 with left (out_features, rank), core (rank, rank), right (rank, in_features).

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.

    Source: Tucker (1966); Moar et al. (2024), section 2; computed by tensorly's higher-order orthogonal iteration.
    """
    import tensorly
    from tensorly.decomposition import tucker as tensorly_tucker

    check_rank(weight, rank)
    with tensorly.backend_context("pytorch"):
        core, (left, right) = tensorly_tucker(
            weight.to(torch.float32), rank=[rank, rank], init="svd", svd="truncated_svd", n_iter_max=_ITERATIONS
        )
    return LowRankFactors(left.contiguous(), right.T.contiguous(), core.contiguous())


def tucker_merged(weight: Tensor, rank: int) -> LowRankFactors:
    """`tucker` with the core multiplied into the left factor: the same product with r^2 fewer parameters and one kernel
    fewer.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.
    """
    factors = tucker(weight, rank)
    assert factors.core is not None  # noqa: S101 - tucker always keeps it
    return LowRankFactors((factors.left @ factors.core).contiguous(), factors.right)


def tucker_of_experts(weight: Tensor, ranks: Sequence[int]) -> TuckerFactors:
    """Tucker decomposition of a fused expert tensor: higher-order orthogonal iteration, starting from the higher-order
    SVD.

    Modes of full rank are left out of the iteration, because their orthogonal factor would cancel against the core. If
    all ranks are full, the core is the weight itself. Decompositions at different ranks are not nested.

    Args:
        weight: Shape (experts, out_features, in_features), floating point.
        ranks: Multilinear ranks (r_e, r_o, r_i), each from 1 to the size of its mode, and for a truncated mode no
            larger than the product of the others.

    Returns:
        Factors in float32, columns (rows of `right`) orthonormal.

    Raises:
        RankError: A rank lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.

    Sources: Tucker (1966); De Lathauwer, De Moor and Vandewalle (2000), the initialisation and the iteration.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    for size, rank in zip(weight.shape, ranks, strict=True):
        others = math.prod(ranks) // max(1, rank)
        largest = size if rank == size else min(size, others)
        if not 1 <= rank <= largest:
            raise RankError(
                f"`1 <= rank <= {largest}` must hold in a mode of size {size}, but got ranks {tuple(ranks)} for a"
                f" tensor of {' x '.join(map(str, weight.shape))}; choose ranks inside their intervals"
            )
    check_finite(weight)
    tensor = weight.detach().to(torch.float32)
    modes = [mode for mode, rank in enumerate(ranks) if rank < tensor.shape[mode]]
    if not modes:
        return TuckerFactors(tensor.contiguous())
    with tensorly.backend_context("pytorch"):
        kept = [ranks[mode] for mode in modes]
        (core, found), _ = partial_tucker(
            tensor, rank=kept, modes=modes, init="svd", svd="truncated_svd", n_iter_max=_ITERATIONS
        )
    factors = {mode: factor.contiguous() for mode, factor in zip(modes, found, strict=True)}
    right = factors.get(2)
    return TuckerFactors(
        core.contiguous(), factors.get(0), factors.get(1), None if right is None else right.T.contiguous()
    )
