"""Warm starts: a ladder of allocations over the divergence table, uniform points, removals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from dse.cost import cost
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import AllocationError, PointError
from dse.report.units import percent
from dse.search.candidate import Candidate
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.table_space import constraints_of
from dse.sensitivity.allocation import allocate
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = [
    "ALLOCATION",
    "REMOVAL",
    "UNIFORM",
    "allocated",
    "allocated_in_time",
    "candidate_of",
    "warm_starts",
]

ALLOCATION, UNIFORM, REMOVAL = "allocation", "uniform", "removal"
_MOST = 12
_CEILING = 0.6  # a start reaches no further: what keeps less than two fifths of a model is a wreck


def warm_starts(
    space: SearchSpace, table: SensitivityTable, trials: int, latency_s: float | None = None
) -> list[Candidate]:
    """About half the budget, a dozen at the most: seven in twelve are allocations, three uniform, two removals.

    Where the table predicts a latency, every other allocation is the one that saves a share of the time instead of a
    share of the parameters: a parameter that no time is saved by is not worth its divergence there.

    Args:
        space: Every candidate keeps its limits.
        table: Divergences of its options.
        trials: Budget of the study.
        latency_s: Most predicted latency of the allocations, where the table predicts it.
    """
    count = max(0, min(_MOST, trials // 2))
    smallest, largest = space.reduction_range()
    low, high = max(space.limits[0], smallest), min(space.limits[1], largest, _CEILING)
    found: list[Candidate] = []
    allocations, uniform, removals = -(-count * 7 // 12), count * 3 // 12, count * 2 // 12
    for origin, points, share in (
        (ALLOCATION, _ladder(space, table, _budgets(low, high, allocations), latency_s), allocations),
        (UNIFORM, _uniform(space, table, _budgets(low, high, uniform)), uniform),
        (REMOVAL, _removals(space, table, _budgets(low, high, removals)), removals),
    ):
        for point, words in list(points)[:share]:
            if not point.is_dense and _keeps(space, point) and all(_point(space, c) != point for c in found):
                found.append(candidate_of(space, point, origin, words))
    return found


def allocated(
    space: SearchSpace, table: SensitivityTable, reduction: float, latency_s: float | None = None
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


def allocated_in_time(
    space: SearchSpace, table: SensitivityTable, share: float, latency_s: float | None = None
) -> tuple[DesignPoint, str] | None:
    """The allocation that saves as much time as this share of the parameters would if time followed parameters.

    What counts is what can be saved at all: where every parameter that may go saves a tenth of the time, half of them
    stand for a twentieth.

    Returns:
        The point, and the time aimed at in words; None where no allocation saves it within the space's limits, or the
        table predicts no latency.
    """
    if table.latency_dense_s is None:
        return None
    kept = 1 - share * _time_for_parameters(space, table)
    budget_s = kept * table.latency_dense_s
    least = max(space.limits[0], 0.0)
    point = allocated(space, table, least, budget_s if latency_s is None else min(budget_s, latency_s))
    words = f"at {kept:.3f} of the dense model's time, {1e3 * budget_s:.3g} ms as predicted"
    return None if point is None else (point, words)


def _time_for_parameters(space: SearchSpace, table: SensitivityTable) -> float:
    """Share of the time that can be saved over the share of the parameters that can."""
    assert table.latency_dense_s is not None  # noqa: S101 - the caller's business
    saved_s, saved = 0.0, 0
    for options in constraints_of(space).allowed_options(table):
        latencies_s = [option.latency_s for option in options if option.latency_s is not None]
        dense = options[0]
        saved += dense.parameters - min(option.parameters for option in options)
        saved_s += 0.0 if dense.latency_s is None else dense.latency_s - min(latencies_s)
    return (saved_s / table.latency_dense_s) / (saved / table.parameters_dense) if saved else 0.0


def candidate_of(space: SearchSpace, point: DesignPoint, origin: str, why: str) -> Candidate:
    """A point as a candidate: by its levels where they say it, else beside the nearest ones."""
    levels = space.nearest_levels(point)
    return Candidate(levels, origin, why, None if space.point(levels) == point else point)


def _budgets(low: float, high: float, count: int) -> list[float]:
    """Reductions from near the mildest to near the strongest, closer together where little is removed."""
    return [low + (high - low) * ((index + 0.75) / count) ** 1.5 * 0.98 for index in range(count)]


def _ladder(
    space: SearchSpace, table: SensitivityTable, budgets: Iterable[float], latency_s: float | None
) -> Iterator[tuple[DesignPoint, str]]:
    within = "" if latency_s is None else ", within the latency limit as predicted"
    for index, budget in enumerate(budgets):
        if index % 2 and (timed := allocated_in_time(space, table, budget, latency_s)) is not None:
            yield timed[0], f"the least divergence in sum {timed[1]}, by the sensitivity profile{within}"
        elif (point := allocated(space, table, budget, latency_s)) is not None:
            yield point, f"the least divergence in sum {_at(space, point)}, by the sensitivity profile{within}"


def _at(space: SearchSpace, point: DesignPoint) -> str:
    return f"at a reduction of {percent(cost(space.topology, point).reduction)}"


def _uniform(
    space: SearchSpace, table: SensitivityTable, budgets: Iterable[float]
) -> Iterator[tuple[DesignPoint, str]]:
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
            point = min(points, key=lambda point: abs(cost(space.topology, point).reduction - budget))
            yield point, f"every block at the same share of its parameters, {_at(space, point)}"


def _removals(
    space: SearchSpace, table: SensitivityTable, budgets: Iterable[float]
) -> Iterator[tuple[DesignPoint, str]]:
    """Nothing but whole blocks, those whose absence costs least."""
    own = constraints_of(space)
    constraints = replace(
        own,
        forbidden=lambda unit, option: (
            (not option.is_dense and not option.removes_block)
            or (own.forbidden is not None and own.forbidden(unit, option))
        ),
    )
    for budget in budgets:
        try:
            point = allocate(table, reduction=budget, constraints=constraints).point
        except AllocationError:
            return
        yield point, f"whole blocks whose absence costs least, {_at(space, point)}"


def _keeps(space: SearchSpace, point: DesignPoint) -> bool:
    try:
        return space.is_feasible(point)
    except PointError:  # no model can run it
        return False


def _point(space: SearchSpace, candidate: Candidate) -> DesignPoint:
    return space.point(candidate.levels) if candidate.point is None else candidate.point
