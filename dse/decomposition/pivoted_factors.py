"""Pivoted factors: a matrix of rank r in r(m + n) - r^2 numbers instead of the r(m + n) of two factors, without loss.

A matrix of rank r has r independent columns. With the pivots p and the other columns q,

    W[:, p] = V (m x r),    W[:, q] = V C (C: r x (n - r)),    so W x = V (x[p] + C x[q]).

Or r independent rows, from which the others are combined: y[p] = V x, y[q] = C y[p]. The permutation costs time, so the
shorter side is the one that is permuted.

Source: PIFA (Zhao et al., arXiv 2501.19090), which pivots rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from dse.decomposition.factors import LowRankFactors
from dse.double_precision import in_double

__all__ = ["PivotedFactors", "pivoted"]


@dataclass(frozen=True, eq=False)
class PivotedFactors:
    """A matrix of rank r by its independent rows or columns.

    Attributes:
        pivots: The independent columns V, shape (out_features, rank), or rows, shape (rank, in_features).
        combinations: C, shape (rank, in_features - rank) for columns, (out_features - rank, rank) for rows.
        columns_or_rows: The pivots, ascending, then the others, ascending, int64.
        of_columns: Whether columns are independent, rather than rows.
    """

    pivots: Tensor
    combinations: Tensor
    columns_or_rows: Tensor
    of_columns: bool

    @property
    def rank(self) -> int:
        """Number of independent columns or rows."""
        return self.pivots.shape[1] if self.of_columns else self.pivots.shape[0]

    @property
    def chosen(self) -> list[int]:
        """Indices of the independent columns or rows, ascending."""
        found: list[int] = self.columns_or_rows[: self.rank].tolist()
        return found

    def product(self) -> Tensor:
        """The matrix, shape (out_features, in_features)."""
        inverse = self.columns_or_rows.argsort()
        if self.of_columns:
            return torch.cat((self.pivots, self.pivots @ self.combinations), dim=1)[:, inverse]
        return torch.cat((self.pivots, self.combinations @ self.pivots))[inverse]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PivotedFactors:
        """Copy to another device and dtype; indices stay int64."""
        return PivotedFactors(
            self.pivots.to(device, dtype),
            self.combinations.to(device, dtype),
            self.columns_or_rows.to(device),
            self.of_columns,
        )


def pivoted(factors: LowRankFactors) -> PivotedFactors:
    """The same matrix by independent columns if it has no more columns than rows, else by independent rows.

    Pivots come from a QR decomposition with column pivoting of an orthonormal basis, in float64, which keeps the
    combinations small.

    Args:
        factors: Two factors or three, of full rank.

    Returns:
        float32 factors on the CPU.
    """
    left, right = in_double(factors.left).cpu(), in_double(factors.right).cpu()
    if factors.core is not None:
        right = in_double(factors.core).cpu() @ right
    of_columns = left.shape[0] >= right.shape[1]
    tall = right.T if of_columns else left
    basis = torch.linalg.qr(tall).Q
    _, _, permutation = scipy.linalg.qr(basis.T.numpy(), mode="economic", pivoting=True)
    rank = left.shape[1]
    chosen = torch.from_numpy(permutation[:rank].copy()).to(torch.int64).sort().values
    is_other = torch.ones(len(tall), dtype=torch.bool)
    is_other[chosen] = False
    others = is_other.nonzero()[:, 0]
    # basis[others] = X basis[chosen]
    combined = torch.linalg.solve(basis[chosen].T, basis[others].T).T
    pivots = left @ right[:, chosen] if of_columns else left[chosen] @ right
    return PivotedFactors(
        pivots.float().contiguous(),
        (combined.T if of_columns else combined).float().contiguous(),
        torch.cat((chosen, others)),
        of_columns,
    )
