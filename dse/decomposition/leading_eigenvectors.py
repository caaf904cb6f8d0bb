"""Eigenvectors of the largest eigenvalues of a symmetric matrix, which may be given as a product with vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dse.double_precision import double_device, in_double

__all__ = ["leading_eigenvectors", "leading_eigenvectors_of_product", "product_in_float64"]

_BLOCK = 32
_LARGEST_SHARE = 0.3
"""Share of the whole space up to which a subspace is cheaper than a full decomposition."""

_FIRST_FACTOR = 3
_CHECK_EVERY = 1.15
"""Dimension, in multiples of the rank, of the first subspace that is checked, and its growth up to the next check."""

_TOLERANCE = 1e-7
"""Residual of an accepted eigenvector, relative to the smallest requested eigenvalue: the rounding of float32."""

_SLICE_BYTES = 32 * 2**20


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues, largest first, as columns; from a full decomposition."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(-1)


def leading_eigenvectors_of_product(
    product: Callable[[Tensor], Tensor], size: int, rank: int, device: torch.device
) -> Tensor | None:
    """Eigenvectors of the `rank` largest eigenvalues of a positive semi-definite matrix that is not formed.

    A block Krylov space with full reorthogonalisation grows until the residual of every requested eigenvector is below
    the rounding of the float32 Gram matrices, relative to the smallest requested eigenvalue.

    Args:
        product: A float64 matrix of shape (size, columns) to its product with the symmetric matrix.
        size: Rows of the symmetric matrix.
        rank: Number of eigenvectors.
        device: Device of the vectors.

    Returns:
        Shape (size, rank), largest eigenvalue first; None if the space would be so large that a full decomposition is
        cheaper.

    Source: Golub and Underwood (1977), the block Lanczos method; Musco and Musco (arXiv 1504.05477) for its error.
    """
    limit, check = int(_LARGEST_SHARE * size), _FIRST_FACTOR * rank + 2 * _BLOCK
    if check > limit:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, _BLOCK, generator=generator, dtype=torch.float64).to(device)
    basis, images = start.new_empty(size, limit + _BLOCK), start.new_empty(size, limit + _BLOCK)
    fresh, used = torch.linalg.qr(start).Q, 0
    while used <= limit:
        basis[:, used : used + _BLOCK] = fresh
        images[:, used : used + _BLOCK] = product(fresh)
        used += _BLOCK
        known, mapped = basis[:, :used], images[:, :used]
        if used >= check:
            check = int(_CHECK_EVERY * used)
            values, rotation = torch.linalg.eigh(known.T @ mapped)
            values, rotation = values[-rank:].flip(0), rotation[:, -rank:].flip(-1)
            vectors = known @ rotation
            residuals = (mapped @ rotation - vectors * values).norm(dim=0)
            if bool((residuals <= _TOLERANCE * values[-1]).all()):
                return vectors
        fresh = mapped[:, -_BLOCK:]
        for _ in range(2):  # the second time removes what rounding left
            fresh = torch.linalg.qr(fresh - known @ (known.T @ fresh)).Q
    return None


def product_in_float64(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrix @ columns` in float64, converting a float32 or half-precision matrix a slice of rows at a time."""
    if matrix.dtype == torch.float64:
        return matrix @ columns
    rows = max(1, _SLICE_BYTES // (8 * matrix.shape[1]))
    return torch.cat([in_double(part) @ columns for part in torch.split(matrix, rows)])
