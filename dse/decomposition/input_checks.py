"""Checks of the inputs of a decomposition: ranks, weights and Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from dse.errors import CalibrationError, NonFiniteError, RankError

__all__ = ["check_finite", "check_gradient_gram", "check_gram", "check_rank"]


def check_rank(weight: Tensor, rank: int) -> None:
    """Check that 1 <= rank <= min(weight.shape) and that the weight is finite.

    Raises:
        RankError: The rank lies outside its interval.
        NonFiniteError: The weight holds NaN or infinity.
    """
    largest = min(weight.shape)
    if not 1 <= rank <= largest:
        raise RankError(
            f"`1 <= rank <= {largest}` must hold for a weight of {weight.shape[0]} x {weight.shape[1]},"
            f" but got rank={rank}; choose a rank inside the interval"
        )
    check_finite(weight)


def check_finite(weight: Tensor) -> None:
    """Check that the weight is finite.

    Raises:
        NonFiniteError: The weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"a weight must be finite to be decomposed, but one of {' x '.join(map(str, weight.shape))} holds"
            " NaN or infinity; check the checkpoint"
        )


def check_gram(gram: Tensor, in_features: int) -> None:
    """Check that `gram` can be the Gram matrix of this many features.

    Raises:
        CalibrationError: It has another size, or all activations are zero.
        NonFiniteError: It holds NaN or infinity.
    """
    if tuple(gram.shape) != (in_features, in_features):
        raise CalibrationError(
            f"the Gram matrix of this weight must have shape {in_features} x {in_features}, but got {tuple(gram.shape)}"
        )
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("calibration activations must be finite, but their Gram matrix holds NaN or infinity")
    if float(gram.diagonal().max()) <= 0:
        raise CalibrationError("calibration activations must not all be zero; use other calibration text")


def check_gradient_gram(gradient_gram: Tensor, out_features: int) -> None:
    """Check that `gradient_gram` can be the Gram matrix of the gradients of this many outputs.

    Raises:
        CalibrationError: It has another size.
        NonFiniteError: It holds NaN or infinity.
    """
    if tuple(gradient_gram.shape) != (out_features, out_features):
        raise CalibrationError(
            f"a Gram matrix of output gradients must have shape {out_features} x {out_features}, but got"
            f" {tuple(gradient_gram.shape)}"
        )
    if not bool(torch.isfinite(gradient_gram).all()):
        raise NonFiniteError("gradients on calibration text must be finite, but their Gram matrix is not")
