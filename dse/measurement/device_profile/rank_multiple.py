"""The multiple that ranks should keep on a device, read off its timings.

Kernels work in tiles: at a rank just above a tile's edge a product pays for the whole next tile, and some libraries
fall back to slower kernels where a dimension is not aligned. A rank a little smaller then saves parameters and no time.
"""

from __future__ import annotations

from collections.abc import Iterable

from dse.cost import break_even_rank
from dse.measurement.device_profile.model_profile import Phase
from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings

__all__ = ["RANK_MULTIPLES", "rank_multiple", "rank_multiple_shapes"]

RANK_MULTIPLES = (64, 32, 16, 8, 4, 2)
"""Multiples that are tried, the largest first."""

_NOISE = 0.02
"""Differences of two timings below this tell nothing."""


def rank_multiple_shapes(matrices: Iterable[tuple[int, int]], phases: Iterable[Phase]) -> list[ProductShape]:
    """The products that `rank_multiple` compares, each once."""
    phases = tuple(phases)
    found = [
        product
        for shape in dict.fromkeys(matrices)
        if (aligned := _aligned_rank(shape))
        for rank in (aligned, *(aligned - multiple // 2 for multiple in RANK_MULTIPLES))
        for phase in phases
        for product in _products(shape, rank, phase)
    ]
    return list(dict.fromkeys(found))


def rank_multiple(matrices: Iterable[tuple[int, int]], phases: Iterable[Phase], timings: ProductTimings) -> int:
    """The largest multiple that a rank may not leave without losing most of what it saves.

    For each multiple m the chain of two products is timed at a rank a that is a multiple of 64, and at a - m / 2, which
    is a multiple of m / 2 and of no more. Were time in proportion to the rank, the second would take m / (2 a) less; if
    it takes less than half of that (in the mean over matrices and phases, and beyond noise), ranks keep to m.

    Args:
        matrices: (out_features, in_features) of what may be decomposed; one for each matrix, equal ones count again.
        phases: Whose products.
        timings: Of the device; measured where they are missing.

    Returns:
        A multiple from `RANK_MULTIPLES`; 1 where no rank is worse than its neighbours, or matrices are too small.
    """
    sizes, phases = tuple(matrices), tuple(phases)
    aligned = [(shape, rank) for shape in sizes if (rank := _aligned_rank(shape))]

    def ratio(multiple: int) -> float:
        """Mean of the time at the smaller rank over that at the aligned one, plus half of what it should save."""
        ratios = [
            _seconds(shape, rank - multiple // 2, phase, timings) / _seconds(shape, rank, phase, timings)
            + 0.5 * (multiple // 2) / rank
            for shape, rank in aligned
            for phase in phases
        ]
        return sum(ratios) / len(ratios)

    return next((m for m in RANK_MULTIPLES if aligned and ratio(m) > 1 + _NOISE), 1)


def _aligned_rank(shape: tuple[int, int]) -> int:
    """A rank in the middle of those that save parameters; 0 where the first tile is above it."""
    return break_even_rank(*shape) * 2 // 3 // RANK_MULTIPLES[0] * RANK_MULTIPLES[0]


def _products(shape: tuple[int, int], rank: int, phase: Phase) -> tuple[ProductShape, ProductShape]:
    return ProductShape(phase.rows, rank, shape[1]), ProductShape(phase.rows, shape[0], rank)


def _seconds(shape: tuple[int, int], rank: int, phase: Phase, timings: ProductTimings) -> float:
    """Of both products, each in its faster layout."""
    return sum(map(timings.best_seconds, _products(shape, rank, phase)))
