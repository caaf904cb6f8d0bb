"""Eigenvectors of the largest eigenvalues of a symmetric matrix, which may be given as a product with vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dse.double_precision import double_device, in_double

__all__ = ["leading_eigenvectors", "leading_eigenvectors_of_product", "product_in_float64"]

_OVERSAMPLING = 16
_LARGEST_SHARE = 0.5
"""Share of the whole space up to which a subspace is cheaper than a full decomposition."""

_FIRST_BLOCKS = 5
_TOLERANCE = 1e-10
"""Residual of an accepted eigenvector, relative to the largest eigenvalue."""

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
    1e-10 of the largest eigenvalue, far below the rounding of the float32 factors. The block has more columns than
    eigenvectors are requested, so repeated eigenvalues are found as well.

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
    block = rank + _OVERSAMPLING
    limit = int(_LARGEST_SHARE * size) // block
    if limit < _FIRST_BLOCKS:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, block, generator=generator, dtype=torch.float64).to(double_device(device))
    basis = torch.linalg.qr(start).Q
    images = product(basis)
    for blocks in range(2, limit + 1):
        fresh = images[:, -block:]
        for _ in range(2):  # the second time removes what rounding left
            fresh = fresh - basis @ (basis.T @ fresh)
        addition = torch.linalg.qr(fresh).Q
        addition = torch.linalg.qr(addition - basis @ (basis.T @ addition)).Q
        basis = torch.cat((basis, addition), dim=1)
        images = torch.cat((images, product(addition)), dim=1)
        if blocks < _FIRST_BLOCKS:
            continue
        values, rotation = torch.linalg.eigh(basis.T @ images)
        values, rotation = values[-rank:].flip(0), rotation[:, -rank:].flip(-1)
        vectors = basis @ rotation
        residuals = (images @ rotation - vectors * values).norm(dim=0)
        if bool((residuals <= _TOLERANCE * values[0]).all()):
            return vectors
    return None


def product_in_float64(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrix @ columns` in float64, converting a float32 or half-precision matrix a slice of rows at a time."""
    if matrix.dtype == torch.float64:
        return matrix @ columns
    rows = max(1, _SLICE_BYTES // (8 * matrix.shape[1]))
    return torch.cat([in_double(part) @ columns for part in torch.split(matrix, rows)])
