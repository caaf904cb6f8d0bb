"""Pivoted factors: a matrix of rank r in r(m + n) - r^2 numbers instead of the r(m + n) of two factors, without loss.

A matrix of rank r has r independent columns. With the pivots p and the other columns q,

    W[:, p] = V (m x r),    W[:, q] = V C (C: r x (n - r)),    so W x = V (x[p] + C x[q]).

Or r independent rows, from which the others are combined: y[p] = V x, y[q] = C y[p]. Both have equally many numbers.

Source: PIFA (Zhao et al., arXiv 2501.19090), which pivots rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dse.decomposition.factors import LowRankFactors
from dse.double_precision import in_double

__all__ = ["PivotedFactors", "pivoted"]

_LARGEST_COEFFICIENT = 1.5
"""Bound of the combinations. Rounding errors grow with them; smaller bounds take many more exchanges."""
_EXCHANGES_PER_ROW = 4


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


def pivoted(factors: LowRankFactors, *, of_columns: bool, device: torch.device | str = "cpu") -> PivotedFactors:
    """The same matrix by independent columns or rows.

    Args:
        factors: Two factors or three, of full rank.
        of_columns: Whether columns are independent, rather than rows.
        device: Where to compute, in float64 if it can.

    Returns:
        float32 factors on the CPU.
    """
    left, right = in_double(factors.left.to(device)), in_double(factors.right.to(device))
    if factors.core is not None:
        right = in_double(factors.core.to(device)) @ right
    rows, combinations = _independent_rows(right.T if of_columns else left)
    chosen = rows[: left.shape[1]]
    pivots = left @ right[:, chosen] if of_columns else left[chosen] @ right
    return PivotedFactors(
        pivots.float().cpu().contiguous(),
        (combinations.T if of_columns else combinations).float().cpu().contiguous(),
        rows,
        of_columns,
    )


def _independent_rows(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Independent rows of a matrix, and how the others follow from them with small coefficients.

    Gaussian elimination with row exchanges finds independent rows. Exchanges of a chosen row for another one, each of
    which enlarges the determinant of the chosen ones, then bound the coefficients.

    Args:
        tall: Shape (rows, rank), of full rank.

    Returns:
        The chosen rows, ascending, then the others, ascending; and C with tall[others] = C tall[chosen].

    Source: Goreinov et al. (2010), "How to find a good submatrix".
    """
    rank = tall.shape[1]
    triangular, exchanges = torch.linalg.lu_factor(tall)
    rows = list(range(len(tall)))
    for row, other in enumerate(exchanges.tolist()):
        rows[row], rows[other - 1] = rows[other - 1], rows[row]
    found = torch.linalg.solve_triangular(
        triangular[:rank], triangular[rank:], upper=False, left=False, unitriangular=True
    )
    for _ in range(_EXCHANGES_PER_ROW * rank):
        other, own = divmod(int(found.abs().argmax()), rank)
        if not float(found[other, own].abs()) > _LARGEST_COEFFICIENT:
            break
        column, change = found[:, own].clone(), found[other].clone()
        change[own] -= 1
        change /= column[other]
        found -= torch.outer(column, change)
        found[other] = -change  # the row that was chosen, by the new ones
        found[other, own] += 1
        rows[own], rows[rank + other] = rows[rank + other], rows[own]
    index = torch.tensor(rows)
    chosen, others = index[:rank].sort(), index[rank:].sort()
    ordered = found[others.indices.to(found.device)][:, chosen.indices.to(found.device)]
    return torch.cat((chosen.values, others.values)), ordered
