"""The module of pivoted factors: a linear layer of rank r by its independent columns or rows.

Exports copy this file's class into their modelling file (`dse.export.modelling_code`), so it imports torch and
`low_rank_modules` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dse.decomposition.low_rank_modules import linear_from

__all__ = ["PivotedLinear"]


class PivotedLinear(nn.Module):
    """Linear layer of rank r by its independent columns or rows (see `dse.decomposition.pivoted_factors`).

    By columns: `y = (x[p] + x[q] C^T) V^T + b`; by rows: `y[p] = x V^T`, `y[q] = y[p] C^T`, and then the bias.

    Args:
        pivots: Shape (out_features, rank) by columns, (rank, in_features) by rows.
        combinations: Shape (rank, in_features - rank) by columns, (out_features - rank, rank) by rows.
        chosen: Indices of the independent columns or rows, ascending.
        of_columns: Whether the columns are independent.
        bias: Shape (out_features,), or None.
    """

    order: Tensor
    """By columns, the independent ones, then the others. By rows, where each output stands among both. int32."""

    def __init__(
        self,
        pivots: Tensor,
        combinations: Tensor,
        chosen: Sequence[int],
        *,
        of_columns: bool,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.of_columns = of_columns
        self.chosen = tuple(chosen)
        self.rank = len(self.chosen)
        self.out_features = pivots.shape[0] if of_columns else self.rank + combinations.shape[0]
        self.in_features = self.rank + combinations.shape[1] if of_columns else pivots.shape[1]
        self.pivots = linear_from(pivots, bias if of_columns else None)
        self.combinations = linear_from(combinations)
        if not (bias is None or isinstance(bias, nn.Parameter)):
            bias = nn.Parameter(bias, requires_grad=False)
        self.row_bias = None if of_columns else bias
        order = torch.tensor(self._indices(), dtype=torch.int32)
        if order.is_meta:  # made under `torch.device("meta")`, where it would lose its values
            order = torch.tensor(self._indices(), dtype=torch.int32, device="cpu")
        self.register_buffer("order", order, persistent=False)  # engines load parameters only

    def set_order(self, chosen: Sequence[int] | None = None) -> None:
        """Write `order` again, after a loader has replaced it by empty memory or for other independent indices."""
        self.chosen = self.chosen if chosen is None else tuple(chosen)
        self.order = torch.tensor(self._indices(), dtype=torch.int32, device=self.order.device)

    def _indices(self) -> list[int]:
        size, chosen = self.in_features if self.of_columns else self.out_features, set(self.chosen)
        order = [*self.chosen, *(index for index in range(size) if index not in chosen)]
        return order if self.of_columns else sorted(range(size), key=order.__getitem__)

    @property
    def bias(self) -> Tensor | None:
        """The bias, shape (out_features,), or None."""
        return self.pivots.bias if self.of_columns else self.row_bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self.of_columns:
            ordered = x.index_select(-1, self.order)
            chosen, others = torch.split(ordered, [self.rank, self.in_features - self.rank], dim=-1)
            return self.pivots(chosen + self.combinations(others))  # type: ignore[no-any-return]
        chosen = self.pivots(x)
        y = torch.cat((chosen, self.combinations(chosen)), dim=-1).index_select(-1, self.order)
        return y if self.row_bias is None else y + self.row_bias

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        side = "columns" if self.of_columns else "rows"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, by {side}"
