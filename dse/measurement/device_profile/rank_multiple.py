"""The multiple that ranks should keep to on a device, derived from product timings.

Kernels work in tiles: a rank just above a tile boundary pays for the whole next tile, and some libraries fall back to
slower kernels for unaligned dimensions. A slightly smaller rank then saves parameters but no time.
"""

from __future__ import annotations

from collections.abc import Iterable

from dse.cost import break_even_rank
from dse.measurement.device_profile.model_profile import Phase
from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings

__all__ = ["RANK_MULTIPLES", "find_rank_multiple", "rank_multiple_shapes"]

RANK_MULTIPLES = (64, 32, 16, 8, 4, 2)
"""Candidate multiples, the largest first."""

_NOISE = 0.02
"""Relative timing differences below this are treated as noise."""


def rank_multiple_shapes(matrices: Iterable[tuple[int, int]], phases: Iterable[Phase]) -> list[ProductShape]:
    """The products that `find_rank_multiple` compares, each once."""
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


def find_rank_multiple(matrices: Iterable[tuple[int, int]], phases: Iterable[Phase], timings: ProductTimings) -> int:
    """The largest multiple that a rank cannot leave without losing most of its time saving.

    For each multiple m the two products of a decomposed matrix are timed at a rank a that is a multiple of 64, and at
    a - m / 2, which is a multiple of m / 2 but not of m. If time were proportional to the rank, the smaller rank would
    save the fraction m / (2 a). If it saves less than half of that (averaged over matrices and phases, and beyond
    noise), ranks keep to m.

    Args:
        matrices: (out_features, in_features) of each decomposable matrix; equal matrices count repeatedly.
        phases: Phases whose products are compared.
        timings: Timings of the device; missing ones are measured.

    Returns:
        A multiple from `RANK_MULTIPLES`; 1 if no rank is worse than its neighbours, or all matrices are too small.
    """
    phases = tuple(phases)
    aligned = [(shape, rank) for shape in matrices if (rank := _aligned_rank(shape))]

    def ratio(multiple: int) -> float:
        """Mean of the time at the smaller rank over that at the aligned rank, plus half of the expected saving."""
        ratios = [
            _seconds(shape, rank - multiple // 2, phase, timings) / _seconds(shape, rank, phase, timings)
            + 0.5 * (multiple // 2) / rank
            for shape, rank in aligned
            for phase in phases
        ]
        return sum(ratios) / len(ratios)

    return next((m for m in RANK_MULTIPLES if aligned and ratio(m) > 1 + _NOISE), 1)


def _aligned_rank(shape: tuple[int, int]) -> int:
    """A multiple of 64 in the middle of the ranks that save parameters; 0 if those end below 64."""
    return break_even_rank(*shape) * 2 // 3 // RANK_MULTIPLES[0] * RANK_MULTIPLES[0]


def _products(shape: tuple[int, int], rank: int, phase: Phase) -> tuple[ProductShape, ProductShape]:
    return ProductShape(phase.rows, rank, shape[1]), ProductShape(phase.rows, shape[0], rank)


def _seconds(shape: tuple[int, int], rank: int, phase: Phase, timings: ProductTimings) -> float:
    """Seconds of both products of a decomposed matrix."""
    return sum(map(timings.seconds, _products(shape, rank, phase)))
