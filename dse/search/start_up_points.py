"""Start-up points of a study without a sensitivity profile, and random points that no trial has had."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from dse.design_point import DesignPoint
from dse.search.spaces.base import SearchSpace

__all__ = ["MAX_START_REDUCTION", "first_points", "unseen_feasible_levels"]

_MAX_OF_A_KIND = 10  # uniform points, and as many random ones
MAX_START_REDUCTION = 0.6
"""Reduction beyond which models are too degraded to start from."""

_DRAWS = 200


def first_points(
    space: SearchSpace, enqueued: Sequence[DesignPoint], *, seed: int, trials: int
) -> list[tuple[dict[str, int], str]]:
    """The points to evaluate after the baseline: enqueued ones, uniform ones, and random ones spread over reductions.

    Independently drawn levels concentrate around one reduction, and a model-based sampler would start from there. The
    start-up points therefore use a third of the budget for two kinds of points: uniform points (one role group at one
    level in all layers), and random points, one from each interval of the feasible reductions.

    Args:
        trials: Budget of the study; 0 for the enqueued points only.

    Returns:
        Levels and origin (`enqueued`, `ladder` for uniform points, `spread` for random ones), in order, without repeats
        and without the dense point.
    """
    proposals = [(space.levels_of(point), "enqueued") for point in enqueued]
    start_up = max(0, min(2 * _MAX_OF_A_KIND, trials // 3) - len(enqueued))
    if start_up:
        uniform = [levels for levels in space.uniform_points() if space.is_feasible(space.point(levels))]
        uniform = uniform[: (start_up + 1) // 2]
        proposals += [(levels, "ladder") for levels in uniform]
        spread = min(_MAX_OF_A_KIND, start_up - len(uniform))
        proposals += [(levels, "spread") for levels in _spread(space, spread, seed)]
    seen, kept = {DesignPoint.dense().id}, []
    for levels, origin in proposals:
        identity = space.point(levels).id
        if identity not in seen:
            seen.add(identity)
            kept.append((levels, origin))
    return kept


def _spread(space: SearchSpace, count: int, seed: int) -> Iterator[dict[str, int]]:
    smallest, largest = space.reduction_range()
    low, high = max(space.limits[0], smallest), min(space.limits[1], largest, MAX_START_REDUCTION)
    generator = random.Random(seed)
    # Intervals widen quadratically: the most useful trade-offs lie at small reductions.
    edges = [low + (high - low) * (index / count) ** 2 for index in range(count + 1)] if count > 0 else []
    for below, above in itertools.pairwise(edges):
        levels = space.draw_feasible(generator, below, above)
        if levels is not None:
            yield levels


def unseen_feasible_levels(space: SearchSpace, seen: set[str], generator: random.Random) -> dict[str, int] | None:
    """Levels of a random feasible point that no trial has had; None if there is none.

    A space that is too large to list counts as exhausted if random draws find nothing new.

    Args:
        seen: Ids of the points that had a trial.
    """
    for _ in range(_DRAWS):
        levels = space.draw_feasible(generator)
        if levels is None:
            return None
        if space.point(levels).id not in seen:
            return levels
    rest = [levels for levels in space.feasible_levels() or () if space.point(levels).id not in seen]
    return generator.choice(rest) if rest else None
