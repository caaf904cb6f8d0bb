"""Which points are proposed beside the sampler's own: the dense model, the user's, a ladder, a spread, repairs."""

from __future__ import annotations

import random

from dse.design_point import DesignPoint
from dse.study.space import SearchSpace
from dse.study.storage import StudyStorage

__all__ = ["enqueue_first_points", "unseen_feasible_levels"]

_START_UP = 10  # plain points, and as many random ones, at the most
_SPREAD_CEILING = 0.6  # a spread reaches no further: what keeps less than two fifths of a model is a wreck, not a start


def enqueue_first_points(
    storage: StudyStorage,
    space: SearchSpace,
    enqueued: tuple[DesignPoint, ...],
    *,
    sampler: str,
    seed: int,
    trials: int,
) -> None:
    """Queue the dense model, then the study's own points, then a ladder of plain points and a spread of random ones.

    Independent levels drawn at random crowd around one reduction; a model-based sampler would start from there. So a
    third of the budget starts it better: plain points (one role group at one level everywhere), as many as spread
    drawn one from each slice of the feasible reductions. Random and quasi-random samplers stay as they are: they are
    baselines.
    """
    storage.enqueue(space.dense_levels, "dense")
    for point in enqueued:
        storage.enqueue(space.levels_of(point), "enqueued")
    if sampler in ("random", "qmc"):
        return
    start_up = max(0, min(2 * _START_UP, trials // 3) - len(enqueued))
    ladder = [levels for levels in space.ladder() if space.is_feasible(space.point(levels))]
    for levels in ladder[: (start_up + 1) // 2]:
        storage.enqueue(levels, "ladder")
    _enqueue_spread(storage, space, min(_START_UP, start_up - min(len(ladder), (start_up + 1) // 2)), seed)


def _enqueue_spread(storage: StudyStorage, space: SearchSpace, count: int, seed: int) -> None:
    smallest, largest = space.reduction_range()
    low, high = max(space.limits[0], smallest), min(space.limits[1], largest, _SPREAD_CEILING)
    generator = random.Random(seed)
    for index in range(count):
        levels = space.draw_feasible(
            generator, low + (high - low) * index / count, low + (high - low) * (index + 1) / count
        )
        if levels is not None:
            storage.enqueue(levels, "spread")


def unseen_feasible_levels(space: SearchSpace, seen: set[str], generator: random.Random) -> dict[str, int] | None:
    """Levels of a random feasible point that no trial has had; None where none turns up, as in an exhausted space."""
    for _ in range(50):
        levels = space.draw_feasible(generator)
        if levels is None:
            return None
        if space.point(levels).id not in seen:
            return levels
    return None
