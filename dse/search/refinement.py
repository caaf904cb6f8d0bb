"""Local refinement: a front point with a little shifted from one group of tensors to another."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from dse.cost import cost
from dse.design_point import DesignPoint
from dse.errors import PointError
from dse.search.candidate import Candidate
from dse.search.goals import FrontPoint, Goal, goal
from dse.search.spaces.base import SearchSpace

__all__ = ["REFINED", "refine"]

REFINED = "refined"
_GOALS = 6
_VARIANTS = 24
_STEPS = 200
_FIXED = ("method",)  # dimensions that refinement leaves as they are: changing one changes every tensor

Levels = dict[str, int]


def refine(
    space: SearchSpace,
    front: Sequence[FrontPoint],
    seen: Collection[str],
    generator: random.Random,
    divergence: Callable[[DesignPoint], float] | None = None,
) -> Candidate | None:
    """An unseen feasible point near the front: rank shifted between groups so that the reduction is as aimed at.

    Args:
        space: Whose levels are moved.
        front: The front so far, in any order.
        seen: Ids of points that had a trial.
        generator: Decides; the same state gives the same point.
        divergence: What a point is expected to lose; the least expected loss is preferred. Without it the point nearest to
            the reduction aimed at is taken.

    Returns:
        The candidate; None where no front point can be changed into anything new.
    """
    members = [entry for entry in front if entry.point.is_dense or _levels(space, entry.point) is not None]
    if all(entry.point.is_dense for entry in members):
        return None
    for _ in range(_GOALS):
        aim = goal(members, generator)
        levels = _levels(space, aim.parent.point)
        if levels is None:
            continue
        variants = list(_variants(space, levels, aim, seen, generator))
        if variants:
            chosen = _chosen(variants, aim, generator, divergence)
            words = f"{aim.words}: trial {aim.parent.trial} with {_changes(levels, chosen)}"
            return Candidate(chosen, REFINED, words)
    return None


def _levels(space: SearchSpace, point: DesignPoint) -> Levels | None:
    try:
        return space.levels_of(point)
    except PointError:
        return None


def _variants(
    space: SearchSpace, parent: Levels, aim: Goal, seen: Collection[str], generator: random.Random
) -> Iterator[tuple[Levels, DesignPoint, float]]:
    """Changed points that are feasible and new, with the distance of their reduction from the aim."""
    found: set[str] = set()
    for _ in range(_VARIANTS):
        levels = _towards(space, parent, aim.reduction, generator)
        for _ in range(generator.choice((1, 1, 2))):
            levels = _exchange(space, levels, aim.reduction, generator)
        point = space.point(levels)
        if point.is_dense or point.id in seen or point.id in found or not space.is_feasible(point):
            continue
        found.add(point.id)
        yield levels, point, abs(_reduction(space, levels) - aim.reduction)


def _chosen(
    variants: Sequence[tuple[Levels, DesignPoint, float]],
    aim: Goal,
    generator: random.Random,
    divergence: Callable[[DesignPoint], float] | None,
) -> Levels:
    nearest = sorted(variants, key=lambda entry: entry[2])
    if divergence is None:
        return nearest[0][0]
    ranked = sorted(nearest[: max(1, (len(nearest) + 1) // 2)], key=lambda entry: divergence(entry[1]))
    # Mostly the best by expectation; now and then another, since what is expected is not what will be measured.
    return ranked[min(int(generator.expovariate(1.0)), len(ranked) - 1)][0]


def _movable(space: SearchSpace, levels: Mapping[str, int], step: int) -> list[str]:
    return [
        name
        for name, size in space.dimensions.items()
        if name not in _FIXED and size > 1 and 0 <= levels[name] + step < size
    ]


def _towards(space: SearchSpace, parent: Levels, target: float, generator: random.Random) -> Levels:
    """Random groups up or down, a level at a time, until the reduction is past the target or next to it."""
    levels, reached = dict(parent), _reduction(space, parent)
    step = 1 if reached < target else -1
    for _ in range(_STEPS):
        movable = _movable(space, levels, step)
        if not movable or step * (target - reached) <= 0:
            return levels
        name = generator.choice(movable)
        moved = {**levels, name: levels[name] + step}
        passed = _reduction(space, moved)
        if step * (target - passed) < 0 and abs(passed - target) > abs(reached - target):
            return levels
        levels, reached = moved, passed
    return levels


def _exchange(space: SearchSpace, levels: Levels, target: float, generator: random.Random) -> Levels:
    """Give one group back what it lost, or a level of it, and take as much as is missing then from another.

    Between two groups of equal shapes this swaps which of them is reduced.
    """
    givers = _movable(space, levels, -1)
    if not givers:
        return levels
    giver = generator.choice(givers)
    lowered = {**levels, giver: generator.choice((levels[giver] - 1, 0))}
    best, distance = levels, float("inf")
    takers = [name for name in _movable(space, lowered, 1) if name != giver]
    for taker in generator.sample(takers, min(4, len(takers))):
        for level in range(lowered[taker] + 1, space.dimensions[taker]):
            moved = {**lowered, taker: level}
            missed = abs(_reduction(space, moved) - target)
            if missed < distance:
                best, distance = moved, missed
            elif missed > distance:
                break
    return best


def _reduction(space: SearchSpace, levels: Mapping[str, int]) -> float:
    return cost(space.topology, space.point(levels)).reduction


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    changed = [f"{name} level {before[name]} -> {after[name]}" for name in after if after[name] != before[name]]
    shown = ", ".join(changed[:6])
    return shown + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
