"""`whitened_svd`: the best approximation for the activations that the layer really sees."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from dse.decomposition.low_rank import LowRankFactors
from dse.decomposition.rank_check import check_rank
from dse.errors import CalibrationError, NonFiniteError

__all__ = ["check_gram", "cholesky_with_damping", "leading_eigenvectors", "whitened_svd"]

logger = logging.getLogger("dse")

_FIRST_DAMPING = 1e-8  # of each channel's power; times ten until the factorisation succeeds
_LARGEST_DAMPING = 1e-1
_DEAD_CHANNEL = 1e-6  # of the mean power: what a channel counts for that was never active


def whitened_svd(weight: Tensor, rank: int, gram: Tensor) -> LowRankFactors:
    """Best rank-`rank` approximation W' of W under calibration activations: it minimises ||(W - W')X||.

    With the Gram matrix G = X X^T = S S^T (Cholesky), ||(W - W')X||_F = ||(W - W')S||_F, so truncating the SVD
    W S = U D V^T gives the optimum W' = (U_r D_r) (V_r^T S^-1) = U_r U_r^T W. It is found from eigenvectors in float64
    on the smaller side of W, which is cheaper than an SVD of W S:

    - out_features <= in_features: U from (WS)(WS)^T = W G W^T and the projection U_r U_r^T W. G is not inverted, so it
      may be singular.
    - otherwise: V from (WS)^T(WS), with S^-1 applied by a triangular solve. Here G must be positive definite; where it
      is not, it is damped and that is said once.

    Args:
        weight: Shape (out_features, in_features), floating point.
        rank: Columns kept, 1 <= rank <= min(weight.shape).
        gram: Sum of x x^T over calibration tokens (any positive multiple), shape (in_features, in_features).

    Returns:
        Factors in float32, columns ordered by what each contributes to the outputs.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight or the Gram matrix holds NaN or infinity.
        CalibrationError: The Gram matrix has another size or no activation at all.

    Source: SVD-LLM (Wang et al., arXiv 2403.07378), truncation-aware data whitening.
    """
    check_rank(weight, rank)
    check_gram(gram, weight.shape[1])
    wide, moments = weight.to(torch.float64), gram.to(torch.float64)
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


def check_gram(gram: Tensor, in_features: int) -> None:
    """Refuse what cannot be the Gram matrix of this many features.

    Raises:
        CalibrationError: It has another size or there was no activation at all.
        NonFiniteError: It holds NaN or infinity.
    """
    if tuple(gram.shape) != (in_features, in_features):
        raise CalibrationError(
            f"a Gram matrix of {in_features} x {in_features} must go with this weight, but got {tuple(gram.shape)}"
        )
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("calibration activations must be finite, but their Gram matrix holds NaN or infinity")
    if float(gram.diagonal().max()) <= 0:
        raise CalibrationError("calibration activations must not all be zero; use other calibration text")


def cholesky_with_damping(gram: Tensor) -> Tensor:
    """Lower Cholesky factor of `gram`, its diagonal raised just enough to make it positive definite.

    Each channel is raised in proportion to its own power: a few channels of language models carry activations
    thousands of times larger than the rest, and a multiple of the mean would drown the others. Channels that were never
    active get a share of the mean.

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
        say_damping_once()


@functools.cache
def say_damping_once() -> None:
    """Log the first damping of a process only: hundreds of tensors would say the same."""
    logger.warning(
        "a Gram matrix of the calibration activations is not positive definite (fewer independent tokens than features,"
        " or dead channels); damping it by %g of its diagonal or more (said once)",
        _FIRST_DAMPING,
    )


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues, largest first, as columns."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(-1)
