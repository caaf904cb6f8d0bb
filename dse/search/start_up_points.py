"""Which points are proposed beside the sampler's own: the user's, a ladder, a spread, repairs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from dse.design_point import DesignPoint
from dse.search.spaces.base import SearchSpace

__all__ = ["first_points", "unseen_feasible_levels"]

_START_UP = 10  # plain points, and as many random ones, at the most
_SPREAD_CEILING = 0.6  # a spread reaches no further: what keeps less than two fifths of a model is a wreck, not a start
_DRAWS = 200


def first_points(
    space: SearchSpace, enqueued: Sequence[DesignPoint], *, seed: int, trials: int
) -> list[tuple[dict[str, int], str]]:
    """What is evaluated after the dense model: the study's own points, a ladder of plain ones, a spread of random ones.

    Independent levels drawn at random crowd around one reduction; a model-based sampler would start from there. So a
    third of the budget starts it better: plain points (one role group at one level everywhere), as many as spread
    drawn one from each slice of the feasible reductions.

    Args:
        space: Of the study.
        enqueued: The study's own points.
        seed: Of the spread.
        trials: Budget of the study; 0 for the study's own points alone.

    Returns:
        Levels and origin (`enqueued`, `ladder` or `spread`), in order; no point twice, and never the dense one.
    """
    proposals = [(space.levels_of(point), "enqueued") for point in enqueued]
    start_up = max(0, min(2 * _START_UP, trials // 3) - len(enqueued))
    if start_up:
        ladder = [levels for levels in space.ladder() if space.is_feasible(space.point(levels))]
        ladder = ladder[: (start_up + 1) // 2]
        proposals += [(levels, "ladder") for levels in ladder]
        proposals += [(levels, "spread") for levels in _spread(space, min(_START_UP, start_up - len(ladder)), seed)]
    seen, kept = {DesignPoint.dense().id}, []
    for levels, origin in proposals:
        identity = space.point(levels).id
        if identity not in seen:
            seen.add(identity)
            kept.append((levels, origin))
    return kept


def _spread(space: SearchSpace, count: int, seed: int) -> Iterator[dict[str, int]]:
    smallest, largest = space.reduction_range()
    low, high = max(space.limits[0], smallest), min(space.limits[1], largest, _SPREAD_CEILING)
    generator = random.Random(seed)
    # Slices grow with the square: most of what people want lies where little is removed and little is lost.
    edges = [low + (high - low) * (index / count) ** 2 for index in range(count + 1)] if count > 0 else []
    for below, above in itertools.pairwise(edges):
        levels = space.draw_feasible(generator, below, above)
        if levels is not None:
            yield levels


def unseen_feasible_levels(space: SearchSpace, seen: set[str], generator: random.Random) -> dict[str, int] | None:
    """Levels of a random feasible point that no trial has had; None where there is none.

    A space too large to list counts as exhausted when random draws find nothing new.
    """
    for _ in range(_DRAWS):
        levels = space.draw_feasible(generator)
        if levels is None:
            return None
        if space.point(levels).id not in seen:
            return levels
    rest = [levels for levels in space.feasible_levels() or () if space.point(levels).id not in seen]
    return generator.choice(rest) if rest else None
