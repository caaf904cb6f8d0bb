"""Eigenvectors of the largest eigenvalues of a symmetric matrix, and products in float64 that need little memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dse.double_precision import in_double

__all__ = ["leading_eigenvectors", "product_in_float64", "symmetric_product"]

_SLICE_BYTES = 32 * 2**20
_BLOCKS = 8
_MIN_BLOCK = 128


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues, largest first, as columns; shape (n, rank).

    On a CPU, up to half of the eigenvectors are computed alone (LAPACK's `syevr`), which takes a third of the time of
    all of them. Both ways are exact to the rounding of float64.
    """
    size = len(symmetric)
    if symmetric.device.type == "cpu" and 2 * rank <= size:
        from scipy.linalg import eigh

        _, found = eigh(symmetric.numpy(), subset_by_index=[size - rank, size - 1], check_finite=False)
        return torch.from_numpy(found).flip(-1)
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(-1)


def product_in_float64(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrix @ columns` in float64, converting a float32 or half-precision matrix a slice of rows at a time."""
    if matrix.dtype == torch.float64:
        return matrix @ columns
    rows = max(1, _SLICE_BYTES // (8 * matrix.shape[1]))
    return torch.cat([in_double(part) @ columns for part in torch.split(matrix, rows)])


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for a product that is symmetric: only the upper triangle of blocks is computed."""
    size = len(left)
    step = max(_MIN_BLOCK, -(-size // _BLOCKS))
    found = left.new_empty(size, size)
    for start in range(0, size, step):
        end = min(start + step, size)
        torch.matmul(left[start:end], right[:, start:], out=found[start:end, start:])
        found[end:, start:end] = found[start:end, end:].T
    return found
