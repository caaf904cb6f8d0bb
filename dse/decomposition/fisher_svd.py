"""`fisher_svd`: optimal for calibration activations and for the effect of each output on the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from dse.decomposition.factors import LowRankFactors
from dse.decomposition.input_checks import check_gradient_gram, check_gram, check_rank
from dse.decomposition.leading_eigenvectors import leading_eigenvectors, product_in_float64, symmetric_product
from dse.decomposition.svd_methods import cholesky_with_damping
from dse.double_precision import in_double

__all__ = ["damped_metric", "fisher_divergence", "fisher_svd"]

_DAMPING = 0.5
"""Share of the mean squared gradient that is added to every output.

A few thousand tokens estimate rare directions poorly, and a direction without gradient must not accept any error at no
cost.
"""


def fisher_svd(weight: Tensor, rank: int, gram: Tensor, gradient_gram: Tensor) -> LowRankFactors:
    """Best rank-`rank` approximation W' of W in the Kronecker-factored Fisher metric.

    To second order, changing W by E costs the model a divergence of 1/2 vec(E)^T F vec(E) nats per token, where F is
    the Fisher matrix E[(x x^T) (x) (g g^T)] of the layer's inputs x and the gradients g of the loss with respect to its
    outputs. If inputs and gradients are independent (K-FAC), F = G (x) D and the divergence is 1/2 ||D^(1/2) E
    G^(1/2)||_F^2. So with D = L L^T and G = S S^T, truncating the SVD L^T W S = U C V^T gives the optimum W' = L^-T U_r
    C_r V_r^T S^-1. `whitened_svd` is the case D = I, where errors in all outputs count alike. As there, the optimum is
    computed from eigenvectors in float64 on the smaller side of W:

    - out_features <= in_features: U from L^T W G W^T L, and W' = (L^-T U_r) (U_r^T L^T W). G is not inverted.
    - otherwise: V from S^T W^T D W S, and W' = (W S V_r) (V_r^T S^-1). D is not inverted.

    The expected divergence is half the sum of the squared singular values that are left out (`fisher_divergence`).

    Args:
        weight: Shape (out_features, in_features), floating point.
        rank: Columns kept, 1 <= rank <= min(weight.shape).
        gram: Mean of x x^T over calibration tokens, shape (in_features, in_features).
        gradient_gram: Mean of g g^T over calibration tokens, shape (out_features, out_features). If it is zero, all
            outputs count alike.

    Returns:
        Factors in float32, columns ordered by their contribution.

    Raises:
        RankError: `rank` lies outside its interval.
        NonFiniteError: The weight or a Gram matrix holds NaN or infinity.
        CalibrationError: A Gram matrix has another size, or all activations are zero.

    Sources: Martens and Grosse 2015 (arXiv 1503.05671) for the Kronecker-factored Fisher; FWSVD (Hsu et al., arXiv
    2207.00112) for weighting a truncated SVD by Fisher information; SVD-LLM (arXiv 2403.07378) for whitening.
    """
    check_rank(weight, rank)
    root, weighted, squares = _weighted(weight, gram, gradient_gram)
    directions = leading_eigenvectors(squares, rank)
    unweighted = torch.linalg.solve_triangular(root.T, directions, upper=True)
    if weight.shape[0] <= weight.shape[1]:
        left, right = unweighted, directions.T @ weighted
    else:
        left, right = weighted @ directions, unweighted.T
    return LowRankFactors(left.to(torch.float32).contiguous(), right.to(torch.float32).contiguous())


def fisher_divergence(weight: Tensor, gram: Tensor, gradient_gram: Tensor) -> Tensor:
    """The expected divergence of `fisher_svd` at every rank.

    Args:
        weight: Shape (out_features, in_features).
        gram: As for `fisher_svd`. Here its scale matters: it must be the mean over tokens.
        gradient_gram: As for `fisher_svd`.

    Returns:
        Nats per token at ranks 0, 1, ..., min(weight.shape), float64, non-increasing, 0 at the end: half the sum of the
        squared singular values left out. All zero if no gradient reaches the tensor.

    Raises:
        NonFiniteError: The weight or a Gram matrix holds NaN or infinity.
        CalibrationError: A Gram matrix has another size, or all activations are zero.
    """
    check_rank(weight, 1)
    squares = torch.linalg.eigvalsh(_weighted(weight, gram, gradient_gram)[2])
    mean = gradient_gram.diagonal().mean().to(squares)
    left_out = torch.cat((squares.new_zeros(1), squares.clamp_min(0).cumsum(0)))  # eigenvalues ascend
    return 0.5 * mean * left_out.flip(0)


def _weighted(weight: Tensor, gram: Tensor, gradient_gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A Cholesky root, W weighted by it, and the symmetric matrix whose eigenvectors `fisher_svd` needs, in float64.

    L, L^T W and L^T W G W^T L if out_features <= in_features; otherwise S, W S and S^T W^T D W S.
    """
    check_gram(gram, weight.shape[1])
    check_gradient_gram(gradient_gram, weight.shape[0])
    wide = in_double(weight)
    metric = damped_metric(in_double(gradient_gram))
    if weight.shape[0] <= weight.shape[1]:
        root = cholesky_with_damping(metric)
        weighted = root.T @ wide
        return root, weighted, symmetric_product(weighted, product_in_float64(gram, weighted.T))
    root = cholesky_with_damping(in_double(gram))
    weighted = wide @ root
    return root, weighted, symmetric_product(weighted.T, metric @ weighted)


def damped_metric(gradient_gram: Tensor) -> Tensor:
    """The metric with a share of its mean diagonal added, scaled to a mean diagonal of 1 for good conditioning."""
    eye = torch.eye(len(gradient_gram), dtype=gradient_gram.dtype, device=gradient_gram.device)
    mean = gradient_gram.diagonal().mean()
    return eye if float(mean) <= 0 else gradient_gram / mean + _DAMPING * eye
