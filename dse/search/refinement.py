"""Local refinement: a front point with some rank moved from one group of tensors to another.

A goal is drawn first: fill a wide gap of the front, or improve one of its points. The parent's levels are then changed
at random until the reduction is the goal's, and the variant with the least expected divergence is proposed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.cost import point_cost
from dse.design_point import DesignPoint
from dse.errors import PointError
from dse.pareto import knee_index
from dse.search.proposal import Proposal
from dse.search.spaces.base import SearchSpace

__all__ = ["REFINED", "FrontPoint", "Goal", "draw_goal", "refine"]

REFINED = "refined"
_GOALS = 6
_VARIANTS = 24
_STEPS = 200
_FIXED = ("method",)  # changing the method would change every tensor

Levels = dict[str, int]


@dataclass(frozen=True)
class FrontPoint:
    """A point of the front.

    Attributes:
        trial: Number of the trial.
        point: The design point.
        reduction: 1 - parameters / dense parameters.
        loss: The first objective that is not a cost, with its sign chosen so that smaller is better.
    """

    trial: int
    point: DesignPoint
    reduction: float
    loss: float


@dataclass(frozen=True)
class Goal:
    """The goal of a refinement.

    Attributes:
        parent: The front point to change.
        reduction: The reduction that the changed point should have.
        why: The goal in words.
    """

    parent: FrontPoint
    reduction: float
    why: str


def draw_goal(front: Sequence[FrontPoint], generator: random.Random) -> Goal:
    """Draw a goal: a gap of the front with probability 1/2, else a front point, in half of these cases the knee.

    Wide gaps are drawn more often than narrow ones.

    Args:
        front: The front, with at least one point that is not dense.
    """
    ordered = sorted(front, key=lambda entry: (entry.reduction, entry.trial))
    changeable = [entry for entry in ordered if not entry.point.is_dense]
    position = _normalised(ordered)
    widths = np.linalg.norm(np.diff(position, axis=0), axis=1)
    if len(ordered) > 1 and widths.any() and generator.random() < 0.5:
        index = generator.choices(range(len(widths)), weights=[float(width) ** 2 for width in widths])[0]
        ends = ordered[index], ordered[index + 1]
        parent = generator.choice([end for end in ends if not end.point.is_dense])
        middle = (ends[0].reduction + ends[1].reduction) / 2
        span = f"reductions {100 * ends[0].reduction:.1f} % and {100 * ends[1].reduction:.1f} %"
        why = f"to fill the gap of the front between trials {ends[0].trial} and {ends[1].trial} ({span})"
        return Goal(parent, middle, why)
    knee = knee_index(position, ["minimize", "minimize"], among=[entry in changeable for entry in ordered])
    if knee is not None and generator.random() < 0.5:
        parent = ordered[knee]
        return Goal(parent, parent.reduction, f"to improve the knee of the front, trial {parent.trial}")
    parent = generator.choice(changeable)
    return Goal(parent, parent.reduction, f"to improve trial {parent.trial} of the front")


def _normalised(ordered: Sequence[FrontPoint]) -> NDArray[np.float64]:
    """Parameters and loss, each scaled to its range on the front; shape (points, 2), smaller is better."""
    values = np.array([[-entry.reduction, entry.loss] for entry in ordered], dtype=np.float64)
    span = np.ptp(values, axis=0)
    result: NDArray[np.float64] = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return result


def refine(
    space: SearchSpace,
    front: Sequence[FrontPoint],
    seen: Collection[str],
    generator: random.Random,
    divergence: Callable[[DesignPoint], float] | None = None,
) -> Proposal | None:
    """A new feasible point near the front: a front point with rank moved between groups.

    Args:
        front: The current front, in any order.
        seen: Ids of points that had a trial.
        generator: Source of randomness; the same state yields the same point.
        divergence: Expected divergence of a point; variants with less are preferred. Without it the variant nearest to
            the goal's reduction is proposed.

    Returns:
        The proposal; None if no front point has a new variant.
    """
    members = [entry for entry in front if entry.point.is_dense or _levels(space, entry.point) is not None]
    if all(entry.point.is_dense for entry in members):
        return None
    for _ in range(_GOALS):
        goal = draw_goal(members, generator)
        levels = _levels(space, goal.parent.point)
        if levels is None:
            continue
        variants = list(_variants(space, levels, goal, seen, generator))
        if variants:
            chosen = _chosen(variants, generator, divergence)
            why = f"{goal.why}: trial {goal.parent.trial} with {_changes(levels, chosen)}"
            return Proposal(chosen, REFINED, why)
    return None


def _levels(space: SearchSpace, point: DesignPoint) -> Levels | None:
    try:
        return space.levels_of(point)
    except PointError:
        return None


def _variants(
    space: SearchSpace, parent: Levels, goal: Goal, seen: Collection[str], generator: random.Random
) -> Iterator[tuple[Levels, DesignPoint, float]]:
    """New feasible variants of the parent, with the distance of their reduction from the goal's."""
    found: set[str] = set()
    for _ in range(_VARIANTS):
        levels = _towards(space, parent, goal.reduction, generator)
        for _ in range(generator.choice((1, 1, 2))):
            levels = _exchange(space, levels, goal.reduction, generator)
        point = space.point(levels)
        if point.is_dense or point.id in seen or point.id in found or not space.is_feasible(point):
            continue
        found.add(point.id)
        yield levels, point, abs(_reduction(space, levels) - goal.reduction)


def _chosen(
    variants: Sequence[tuple[Levels, DesignPoint, float]],
    generator: random.Random,
    divergence: Callable[[DesignPoint], float] | None,
) -> Levels:
    nearest = sorted(variants, key=lambda entry: entry[2])
    if divergence is None:
        return nearest[0][0]
    ranked = sorted(nearest[: max(1, (len(nearest) + 1) // 2)], key=lambda entry: divergence(entry[1]))
    # Mostly the best expected one; sometimes another, because the expected divergence is uncertain.
    return ranked[min(int(generator.expovariate(1.0)), len(ranked) - 1)][0]


def _movable(space: SearchSpace, levels: Mapping[str, int], step: int) -> list[str]:
    """Dimensions whose level can change by `step`."""
    return [
        name
        for name, size in space.dimensions.items()
        if name not in _FIXED and size > 1 and 0 <= levels[name] + step < size
    ]


def _towards(space: SearchSpace, parent: Levels, target: float, generator: random.Random) -> Levels:
    """Raise or lower random groups one level at a time, until the reduction is as near to the target as possible."""
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
    """Lower the level of one group, by one or to dense, and raise another so that the reduction stays near the target.

    For two groups of equal shapes this swaps which of them is reduced.
    """
    lowerable = _movable(space, levels, -1)
    if not lowerable:
        return levels
    lowered_name = generator.choice(lowerable)
    lowered = {**levels, lowered_name: generator.choice((levels[lowered_name] - 1, 0))}
    best, distance = levels, float("inf")
    raisable = [name for name in _movable(space, lowered, 1) if name != lowered_name]
    for raised_name in generator.sample(raisable, min(4, len(raisable))):
        for level in range(lowered[raised_name] + 1, space.dimensions[raised_name]):
            moved = {**lowered, raised_name: level}
            missed = abs(_reduction(space, moved) - target)
            if missed < distance:
                best, distance = moved, missed
            elif missed > distance:
                break
    return best


def _reduction(space: SearchSpace, levels: Mapping[str, int]) -> float:
    return point_cost(space.topology, space.point(levels)).reduction


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    changed = [f"{name} level {before[name]} -> {after[name]}" for name in after if after[name] != before[name]]
    shown = ", ".join(changed[:6])
    return shown + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
