"""Warm starts: a ladder of allocations over the damage table, uniform points, removals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dse.allocation import Constraints, DamageTable, allocate
from dse.cost import cost
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import AllocationError, PointError
from dse.pareto.units import percent
from dse.study.search.candidate import Candidate
from dse.study.space import SearchSpace
from dse.study.space.table_space import constraints_of

__all__ = ["ALLOCATION", "REMOVAL", "UNIFORM", "allocated", "candidate_of", "warm_starts"]

ALLOCATION, UNIFORM, REMOVAL = "allocation", "uniform", "removal"
_MOST = 12
_CEILING = 0.6  # a start reaches no further: what keeps less than two fifths of a model is a wreck


def warm_starts(space: SearchSpace, table: DamageTable, trials: int, latency_s: float | None = None) -> list[Candidate]:
    """About half the budget, a dozen at the most: seven in twelve are allocations, three uniform, two removals.

    Args:
        space: Every candidate keeps its limits.
        table: Damages of its options.
        trials: Budget of the study.
        latency_s: Most predicted latency of the allocations, where the table predicts it.
    """
    count = max(0, min(_MOST, trials // 2))
    smallest, largest = space.reduction_range()
    low, high = max(space.limits[0], smallest), min(space.limits[1], largest, _CEILING)
    found: list[Candidate] = []
    for origin, points, share in (
        (ALLOCATION, _ladder(space, table, _budgets(low, high, -(-count * 7 // 12)), latency_s), -(-count * 7 // 12)),
        (UNIFORM, _uniform(space, table, _budgets(low, high, count * 3 // 12)), count * 3 // 12),
        (REMOVAL, _removals(space, table, _budgets(low, high, count * 2 // 12)), count * 2 // 12),
    ):
        for point in list(points)[:share]:
            if not point.is_dense and _keeps(space, point) and all(_point(space, c) != point for c in found):
                found.append(candidate_of(space, point, origin, _words(space, origin, point, latency_s)))
    return found


def allocated(
    space: SearchSpace, table: DamageTable, reduction: float, latency_s: float | None = None
) -> DesignPoint | None:
    """The allocation at a reduction that keeps the space's limits, and a predicted latency; None where none does."""
    for target in (reduction, reduction - 0.002, reduction - 0.005):
        try:
            found = allocate(table, reduction=max(target, 0.0), latency_s=latency_s, constraints=constraints_of(space))
            point = found.point
        except AllocationError:
            continue
        if not point.is_dense and _keeps(space, point):
            return point
    return None


def candidate_of(space: SearchSpace, point: DesignPoint, origin: str, why: str) -> Candidate:
    """A point as a candidate: by its levels where they say it, else beside the nearest ones."""
    levels = space.nearest_levels(point)
    return Candidate(levels, origin, why, None if space.point(levels) == point else point)


def _budgets(low: float, high: float, count: int) -> list[float]:
    """Reductions from near the mildest to near the strongest, closer together where little is removed."""
    return [low + (high - low) * ((index + 0.75) / count) ** 1.5 * 0.98 for index in range(count)]


def _ladder(
    space: SearchSpace, table: DamageTable, budgets: Iterable[float], latency_s: float | None
) -> Iterator[DesignPoint]:
    for budget in budgets:
        point = allocated(space, table, budget, latency_s)
        if point is not None:
            yield point


def _uniform(space: SearchSpace, table: DamageTable, budgets: Iterable[float]) -> Iterator[DesignPoint]:
    """Every unit at the same share of its parameters, as near to each budget as shares of the table come."""
    allowed = constraints_of(space).allowed_options(table)
    shares = sorted(
        {
            round(o.parameters / options[0].parameters, 2)
            for options in allowed
            for o in options[1:]
            if not o.removes_block
        }
    )
    points = []
    for share in shares:
        choices: list[tuple[str, TensorChoice]] = []
        for options in allowed:
            decomposed = [o for o in options if not o.removes_block and not o.is_dense]
            if decomposed:
                nearest = min(decomposed, key=lambda o: abs(o.parameters / options[0].parameters - share))
                choices += nearest.choices
        points.append(DesignPoint(tuple(choices)))
    for budget in budgets:
        if points:
            yield min(points, key=lambda point: abs(cost(space.topology, point).reduction - budget))


def _removals(space: SearchSpace, table: DamageTable, budgets: Iterable[float]) -> Iterator[DesignPoint]:
    """Nothing but whole blocks, those whose absence costs least."""
    own = constraints_of(space)
    constraints = replace(
        own,
        forbidden=lambda unit, option: (
            (not option.is_dense and not option.removes_block)
            or (own.forbidden is not None and own.forbidden(unit, option))
        ),
    )
    yield from _only(table, budgets, constraints)


def _only(table: DamageTable, budgets: Iterable[float], constraints: Constraints) -> Iterator[DesignPoint]:
    for budget in budgets:
        try:
            yield allocate(table, reduction=budget, constraints=constraints).point
        except AllocationError:
            return


def _keeps(space: SearchSpace, point: DesignPoint) -> bool:
    try:
        return space.is_feasible(point)
    except PointError:  # no model can run it
        return False


def _point(space: SearchSpace, candidate: Candidate) -> DesignPoint:
    return space.point(candidate.levels) if candidate.point is None else candidate.point


def _words(space: SearchSpace, origin: str, point: DesignPoint, latency_s: float | None) -> str:
    reduction = percent(cost(space.topology, point).reduction)
    words: Mapping[str, str] = {
        ALLOCATION: f"the least damage in sum at a reduction of {reduction}, by the sensitivity profile"
        + ("" if latency_s is None else ", within the latency limit as predicted"),
        UNIFORM: f"every block at the same share of its parameters, a reduction of {reduction}",
        REMOVAL: f"whole blocks whose absence costs least, a reduction of {reduction}",
    }
    return words[origin]
