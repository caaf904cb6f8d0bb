"""Eigenvectors of the largest eigenvalues of a symmetric matrix, which need not be formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dse.double_precision import in_double

__all__ = ["SymmetricProduct", "leading_eigenvectors", "product_in_float64"]

_BLOCK = 32
_LARGEST_SHARE = 0.3
"""Share of the whole space up to which a subspace is cheaper than a full decomposition."""

_FIRST_FACTOR = 3
_CHECK_EVERY = 1.15
"""Dimension, in multiples of the rank, of the first subspace that is checked, and its growth up to the next check."""

_TOLERANCE = 1e-7
"""Residual of an accepted eigenvector, relative to the smallest requested eigenvalue: the rounding of float32."""

_SLICE_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False)
class SymmetricProduct:
    """A positive semi-definite matrix in float64, as its product with vectors.

    Attributes:
        size: Rows.
        device: Device of the vectors.
        times: A matrix of shape (size, columns) to its product with the symmetric matrix.
        form: Computes the symmetric matrix itself.
    """

    size: int
    device: torch.device
    times: Callable[[Tensor], Tensor]
    form: Callable[[], Tensor]


def leading_eigenvectors(symmetric: SymmetricProduct, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues, largest first, as columns; shape (size, rank).

    A few of many are found in a subspace. Otherwise, or if that does not converge, the matrix is formed and decomposed.
    """
    vectors = _in_a_subspace(symmetric, rank)
    if vectors is None:
        vectors = torch.linalg.eigh(symmetric.form()).eigenvectors[:, -rank:].flip(-1)
    return vectors


def _in_a_subspace(symmetric: SymmetricProduct, rank: int) -> Tensor | None:
    """The leading eigenvectors without the matrix; None if a full decomposition is cheaper.

    A block Krylov space with full reorthogonalisation grows until the residual of every requested eigenvector is below
    the rounding of the float32 Gram matrices, relative to the smallest requested eigenvalue.

    Source: Golub and Underwood (1977), the block Lanczos method; Musco and Musco (arXiv 1504.05477) for its error.
    """
    limit, check = int(_LARGEST_SHARE * symmetric.size), _FIRST_FACTOR * rank + 2 * _BLOCK
    if check > limit:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(symmetric.size, _BLOCK, generator=generator, dtype=torch.float64).to(symmetric.device)
    basis, images = (start.new_empty(symmetric.size, limit + _BLOCK) for _ in range(2))
    fresh, used = torch.linalg.qr(start).Q, 0
    while used <= limit:
        basis[:, used : used + _BLOCK] = fresh
        images[:, used : used + _BLOCK] = symmetric.times(fresh)
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
