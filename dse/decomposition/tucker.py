"""`tucker` and `tucker_merged`: Tucker decomposition of the matrix, as in the paper; the only importer of tensorly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dse.decomposition.low_rank import LowRankFactors
from dse.decomposition.rank_check import check_rank

__all__ = ["tucker", "tucker_merged"]

_ITERATIONS = 20


def tucker(weight: Tensor, rank: int) -> LowRankFactors:
    """Tucker decomposition of a matrix: left factor, r x r core, right factor.

    For a matrix the higher-order SVD is the SVD with both bases kept orthonormal and the singular values in the core,
    so the approximation equals `truncated_svd`'s; what differs is that the core stays a layer of its own and costs
    r^2 parameters and FLOPs more, as in the paper. Leading columns and the leading block of the core are the
    decomposition at a smaller rank.

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
    from tensorly.decomposition import tucker as tensorly_tucker

    check_rank(weight, rank)
    with _torch_backend():
        core, (left, right) = tensorly_tucker(
            weight.to(torch.float32), rank=[rank, rank], init="svd", svd="truncated_svd", n_iter_max=_ITERATIONS
        )
    return LowRankFactors(left.contiguous(), right.T.contiguous(), core.contiguous())


def tucker_merged(weight: Tensor, rank: int) -> LowRankFactors:
    """`tucker` with the core multiplied into the left factor: same product, r^2 fewer parameters, one kernel fewer.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.
    """
    factors = tucker(weight, rank)
    assert factors.core is not None  # noqa: S101 - tucker always keeps it
    return LowRankFactors((factors.left @ factors.core).contiguous(), factors.right)


@contextlib.contextmanager
def _torch_backend() -> Iterator[None]:
    """Set tensorly's global backend for this block and restore it: other users of tensorly must not notice us."""
    import tensorly

    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    try:
        yield
    finally:
        tensorly.set_backend(before)
