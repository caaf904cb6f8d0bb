"""Chains of products from one input as one call of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dse.kernel.library import has_kernel, is_supported

__all__ = ["FEW_ROWS", "ChainMatrix", "KernelChains", "ManyRows"]

ManyRows = Literal["torch", "onednn", "panels"]
"""What multiplies many rows: the library that torch uses, the other one that it carries, or `dse/kernel/panels.h`."""

FEW_ROWS = 16
"""Most rows that count as few, as in `chains.h`: up to 32 it is faster than a matrix library or level, at 64 slower."""


@dataclass(frozen=True)
class ChainMatrix:
    """A matrix (rows, columns) within a flat tensor, row by row.

    Attributes:
        rows: Of its outputs.
        columns: Of its inputs.
        weight_at: Index of its first number.
        bias_at: Index of its bias; None where it has none.
    """

    rows: int
    columns: int
    weight_at: int
    bias_at: int | None = None


class KernelChains:
    """Products of one input, in chains: each begins with the input, and the results lie side by side.

    Args:
        weights: All matrices and biases, a flat tensor: one place in memory, read from one end to the other.
        chains: The matrices of each chain in order, as parts of `weights`.
        many: What multiplies many rows.

    Attributes:
        weights: As given.
        layout: What the kernel calls a layout: eight integers for each product, by stage.
        out_features: Numbers in a row of the results.
        scratch: Numbers in a row of what lies between the first and the last matrices.
        many: As given. A call itself goes by panels; the libraries are for whole layers (`dse/kernel/prefill.h`).
    """

    def __init__(self, weights: Tensor, chains: Sequence[Sequence[ChainMatrix]], *, many: ManyRows = "torch") -> None:
        self.weights = weights
        self.many = many
        self.out_features = sum(chain[-1].rows for chain in chains)
        self.scratch = sum(matrix.rows for chain in chains for matrix in chain[:-1])
        self.layout = torch.tensor(_layout(chains), dtype=torch.long)

    @classmethod
    def one_by_one(cls, weights: Tensor, matrices: Sequence[ChainMatrix]) -> KernelChains:
        """Products of one input, each begun when the last is done, as the matrices of a layer are; to be timed.

        Args:
            weights: As of the class.
            matrices: In order. The result is that of the last one, in the columns it has.
        """
        found = cls(weights, [])
        found.out_features = max(matrix.rows for matrix in matrices)
        rows = [[stage, m.rows, m.columns, m.weight_at, -1, -1, -1, 0] for stage, m in enumerate(matrices)]
        found.layout = torch.tensor(rows, dtype=torch.long)
        return found

    @staticmethod
    def is_for(weights: Tensor) -> bool:
        """Whether the kernel is here and knows the type of these weights."""
        return is_supported(weights.device, weights.dtype) and weights.is_contiguous() and has_kernel()

    @property
    def many_number(self) -> int:
        """`many` as the kernel counts."""
        return get_args(ManyRows).index(self.many)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel is for this input: few rows, or any by panels, of which nobody asks for gradients."""
        is_recorded = torch.is_grad_enabled() and x.requires_grad
        is_wanted = 0 < x.numel() <= FEW_ROWS * x.shape[-1] or (self.many == "panels" and x.numel() > 0)
        return is_wanted and not is_recorded and is_supported(x.device, x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., the results of all chains)."""
        found: Tensor = torch.ops.dse.chains(x, self.weights, self.layout, self.out_features, self.scratch)
        return found


def _layout(chains: Sequence[Sequence[ChainMatrix]]) -> list[list[int]]:
    """The rows that `products.h` calls a layout, by stage: the first matrices of all chains, then the second ones."""
    rows = []
    scratch = result = 0
    for chain in chains:
        source = -1
        for stage, matrix in enumerate(chain):
            is_last = stage == len(chain) - 1
            bias_at = -1 if matrix.bias_at is None else matrix.bias_at
            sink = -1 if is_last else scratch
            rows.append([stage, matrix.rows, matrix.columns, matrix.weight_at, bias_at, source, sink, result])
            source, scratch = sink, scratch + (0 if is_last else matrix.rows)
        result += chain[-1].rows
    return sorted(rows, key=lambda row: row[0])
