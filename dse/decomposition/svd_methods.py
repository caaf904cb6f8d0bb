"""`svd` and `whitened_svd`: optimal in the Frobenius norm, and optimal for calibration activations."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from dse.decomposition.factors import LowRankFactors
from dse.decomposition.input_checks import check_gram, check_rank
from dse.double_precision import in_double
from dse.errors import CalibrationError

__all__ = ["cholesky_with_damping", "leading_eigenvectors", "truncated_svd", "whitened_svd"]

logger = logging.getLogger("dse")

_FIRST_DAMPING = 1e-8  # share of each channel's power; multiplied by ten until the factorisation succeeds
_LARGEST_DAMPING = 1e-1
_DEAD_CHANNEL = 1e-6  # share of the mean power assumed for a channel that is never active


def truncated_svd(weight: Tensor, rank: int) -> LowRankFactors:
    """Best rank-`rank` approximation of `weight` in the Frobenius norm.

    Args:
        weight: Shape (out_features, in_features), floating point.
        rank: Columns kept, 1 <= rank <= min(weight.shape).

    Returns:
        Factors with left (out_features, rank) and right (rank, in_features) in float32. The singular values are
        absorbed in `left`, so the error of a truncation is the norm of the columns left out.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.

    Source: Eckart and Young (1936).
    """
    check_rank(weight, rank)
    left, singular_values, right = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    return LowRankFactors((left[:, :rank] * singular_values[:rank]).contiguous(), right[:rank].contiguous())


def whitened_svd(weight: Tensor, rank: int, gram: Tensor) -> LowRankFactors:
    """Best rank-`rank` approximation W' of W for calibration activations X: it minimises ||(W - W')X||_F.

    With the Gram matrix G = X X^T = S S^T (Cholesky), ||(W - W')X||_F = ||(W - W')S||_F, so truncating the SVD W S = U
    D V^T gives the optimum W' = (U_r D_r) (V_r^T S^-1) = U_r U_r^T W. It is computed from eigenvectors in float64 on
    the smaller side of W, which is cheaper than an SVD of W S:

    - out_features <= in_features: U from (WS)(WS)^T = W G W^T and the projection U_r U_r^T W. G is not inverted, so it
      may be singular.
    - otherwise: V from (WS)^T(WS), with S^-1 applied by a triangular solve. Here G must be positive definite; if it is
      not, it is damped, with one warning per process.

    Args:
        weight: Shape (out_features, in_features), floating point.
        rank: Columns kept, 1 <= rank <= min(weight.shape).
        gram: Sum of x x^T over calibration tokens (any positive multiple), shape (in_features, in_features).

    Returns:
        Factors in float32, columns ordered by their contribution to the outputs.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight or the Gram matrix holds NaN or infinity.
        CalibrationError: The Gram matrix has another size, or all activations are zero.

    Source: SVD-LLM (Wang et al., arXiv 2403.07378), truncation-aware data whitening.
    """
    check_rank(weight, rank)
    check_gram(gram, weight.shape[1])
    wide, moments = in_double(weight), in_double(gram)
    if weight.shape[0] <= weight.shape[1]:
        left = leading_eigenvectors(wide @ moments @ wide.T, rank)
        right = left.T @ wide
    else:
        cholesky = cholesky_with_damping(moments)
        whitened = wide @ cholesky
        directions = leading_eigenvectors(whitened.T @ whitened, rank)
        left = whitened @ directions
        right = torch.linalg.solve_triangular(cholesky.T, directions, upper=True).T
    return LowRankFactors(left.to(torch.float32).contiguous(), right.to(torch.float32).contiguous())


def cholesky_with_damping(gram: Tensor) -> Tensor:
    """Lower Cholesky factor of `gram`, with just enough added to its diagonal to make it positive definite.

    Each channel is damped in proportion to its own power: a few channels of language models carry activations thousands
    of times larger than the rest, and a multiple of the mean would swamp the others. Channels that are never active get
    a share of the mean.

    Args:
        gram: Symmetric positive semi-definite, finite and not zero, shape (n, n), float64.

    Raises:
        CalibrationError: The matrix is not positive definite even with a tenth of its diagonal added.
    """
    power = gram.diagonal()
    power = power.clamp_min(_DEAD_CHANNEL * float(power.mean()))
    damping = 0.0
    while True:
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag(damping * power))
        if int(info) == 0 and bool((factor.diagonal() > 1e-7 * power.sqrt()).all()):
            return factor
        damping = _FIRST_DAMPING if damping == 0 else damping * 10
        if damping > _LARGEST_DAMPING:
            raise CalibrationError(
                "the Gram matrix of the calibration activations must become positive definite with damping, but it"
                f" does not at {_LARGEST_DAMPING:g} of its diagonal; use more calibration tokens"
            )
        warn_of_damping()


@functools.cache
def warn_of_damping() -> None:
    """Warn of the first damping in a process only; hundreds of tensors would repeat the warning."""
    logger.warning(
        "a Gram matrix of the calibration activations is not positive definite (fewer independent tokens than features,"
        " or dead channels); damping it by %g of its diagonal or more (reported once)",
        _FIRST_DAMPING,
    )


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues, largest first, as columns."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(-1)
