"""How far two correct computations of the same scores differ, and which queries are compared.

Rounding depends on the dtype, the depth of the model and the shapes in a batch, so no constant fits all models. The
noise is measured: the model's plain forward pass scores the same sequences alone and in padded batches, which changes
nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dse.evaluation.scoring.packing import Query, Row
from dse.evaluation.scoring.state_queue import Score

__all__ = ["agree", "queries_to_check", "rows_to_check", "tolerance"]

_CHECKED_QUERIES = 4
_CHECKED_NODES = 192
_NOISE_FACTOR = 2.0
"""A different attention kernel rounds differently from the plain pass, by up to twice its own noise."""

# Units in the last place of a log-probability that rounding may change although the noise happens to be 0, as it is
# where two batches run the same kernel. Half-precision models sum in float32 and round at the end of each operation.
_ULPS = {torch.float64: 32, torch.float32: 32, torch.float16: 1, torch.bfloat16: 1}


def rows_to_check(rows: Sequence[Row]) -> list[Row]:
    """The longest rows, enough of them for a row as it occurs later, in which trees are joined.

    Args:
        rows: Rows of one kind, longest first.
    """
    chosen, nodes = list(rows[:1]), len(rows[0])
    for row in rows[1:]:
        if nodes + len(row) > _CHECKED_NODES and len(chosen) > 1:
            break
        chosen.append(row)
        nodes += len(row)
    return chosen


def queries_to_check(rows: Sequence[Row]) -> list[int]:
    """Indices of a few queries of these rows: the first and the last, which differ most within a tree."""
    indices = [index for row in rows for index, _ in row.queries]
    half = _CHECKED_QUERIES // 2
    return indices if len(indices) <= _CHECKED_QUERIES else [*indices[:half], *indices[-half:]]


def tolerance(
    truth: Sequence[Score], repeats: Sequence[Sequence[Score]], queries: Sequence[Query], dtype: torch.dtype
) -> float:
    """Largest difference per scored token that is still rounding, in nats.

    Args:
        truth: Scores by the plain pass, each sequence alone.
        repeats: Scores of the same queries by the plain pass in other batches.
        queries: The queries.
        dtype: Of the model's weights.
    """
    noise = max((_difference(truth, repeat, queries) for repeat in repeats), default=0.0)
    scale = max(abs(value) / query.scored for (value, _), query in zip(truth, queries, strict=True))
    return _NOISE_FACTOR * noise + _ULPS[dtype] * torch.finfo(dtype).eps * max(1.0, scale)


def agree(found: Sequence[Score], truth: Sequence[Score], queries: Sequence[Query], most: float) -> bool:
    """Whether no score differs by more than `most` nats per scored token."""
    return _difference(found, truth, queries) <= most  # False for NaN


def _difference(one: Sequence[Score], other: Sequence[Score], queries: Sequence[Query]) -> float:
    pairs = zip(one, other, queries, strict=True)
    return max(abs(a - b) / query.scored for (a, _), (b, _), query in pairs)
