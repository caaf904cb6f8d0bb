"""Warm starts from a sensitivity table: allocations over a range of reductions, uniform points, and removals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from dse.cost import point_cost
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import AllocationError, PointError
from dse.search.proposal import Proposal
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.table_space import constraints_of
from dse.search.start_up_points import MAX_START_REDUCTION
from dse.sensitivity.allocation import allocate
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["ALLOCATION", "REMOVAL", "UNIFORM", "allocated_for_latency", "allocated_point", "proposal_of", "warm_starts"]

ALLOCATION, UNIFORM, REMOVAL = "allocation", "uniform", "removal"
_MAX_WARM_STARTS = 12


def warm_starts(
    space: SearchSpace, table: SensitivityTable, trials: int, max_latency_s: float | None = None
) -> list[Proposal]:
    """Warm starts for half the budget, at most twelve: 7/12 allocations, 3/12 uniform points, 2/12 removals.

    If the table predicts a latency, every other allocation saves a share of the latency instead of the parameters,
    because removing parameters that save no time is not worth their divergence.

    Args:
        space: The search space; every warm start satisfies its limits.
        table: Sensitivity table of the space's options.
        trials: Budget of the study.
        max_latency_s: Limit on the predicted latency of the allocations; None for no limit.
    """
    count = max(0, min(_MAX_WARM_STARTS, trials // 2))
    smallest, largest = space.reduction_range()
    low, high = max(space.limits[0], smallest), min(space.limits[1], largest, MAX_START_REDUCTION)
    found: list[Proposal] = []
    allocations, uniform, removals = -(-count * 7 // 12), count * 3 // 12, count * 2 // 12
    for origin, points, share in (
        (ALLOCATION, _allocations(space, table, _reductions(low, high, allocations), max_latency_s), allocations),
        (UNIFORM, _uniform(space, table, _reductions(low, high, uniform)), uniform),
        (REMOVAL, _removals(space, table, _reductions(low, high, removals)), removals),
    ):
        for point, why in list(points)[:share]:
            if not point.is_dense and _is_feasible(space, point) and all(_point(space, p) != point for p in found):
                found.append(proposal_of(space, point, origin, why))
    return found


def allocated_point(
    space: SearchSpace, table: SensitivityTable, reduction: float, max_latency_s: float | None = None
) -> DesignPoint | None:
    """The allocation at a reduction, within the space's limits and a predicted latency; None if there is none."""
    # An allocation may overshoot the reduction, and with it the upper limit of the space.
    for target in (reduction, reduction - 0.002, reduction - 0.005):
        try:
            found = allocate(
                table, reduction=max(target, 0.0), latency_s=max_latency_s, constraints=constraints_of(space)
            )
        except AllocationError:
            continue
        if not found.point.is_dense and _is_feasible(space, found.point):
            return found.point
    return None


def allocated_for_latency(
    space: SearchSpace, table: SensitivityTable, share: float, max_latency_s: float | None = None
) -> tuple[DesignPoint, str] | None:
    """The allocation whose latency reduction corresponds to a reduction of parameters.

    The two are converted by what the space can save: if removing all that it may remove saves a tenth of the latency,
    half of these parameters correspond to a twentieth of the latency.

    Args:
        share: The reduction of parameters to convert.
        max_latency_s: Limit on the predicted latency; None for no limit.

    Returns:
        The point, and its latency budget in words; None if no allocation within the space's limits meets it, or if the
        table predicts no latency.
    """
    dense_s = table.latency_dense_s
    if dense_s is None:
        return None
    ratio = 1 - share * _latency_per_parameters(space, table, dense_s)
    budget_s = ratio * dense_s
    min_reduction = max(space.limits[0], 0.0)
    limit_s = budget_s if max_latency_s is None else min(budget_s, max_latency_s)
    point = allocated_point(space, table, min_reduction, limit_s)
    budget = f"at {ratio:.3f} of the dense model's latency (predicted {1e3 * budget_s:.3g} ms)"
    return None if point is None else (point, budget)


def _latency_per_parameters(space: SearchSpace, table: SensitivityTable, dense_s: float) -> float:
    """Largest latency reduction divided by largest reduction of parameters, over the allowed options."""
    saved_s, saved = 0.0, 0
    for options in constraints_of(space).allowed_options(table):
        latencies_s = [option.latency_s for option in options if option.latency_s is not None]
        dense = options[0]
        saved += dense.parameters - min(option.parameters for option in options)
        saved_s += 0.0 if dense.latency_s is None else dense.latency_s - min(latencies_s)
    return (saved_s / dense_s) / (saved / table.parameters_dense) if saved else 0.0


def proposal_of(space: SearchSpace, point: DesignPoint, origin: str, why: str) -> Proposal:
    """A point as a proposal: by its levels if they determine it, else by the nearest levels and the point itself."""
    levels = space.nearest_levels(point)
    return Proposal(levels, origin, why, None if space.point(levels) == point else point)


def _reductions(low: float, high: float, count: int) -> list[float]:
    """Reductions from near `low` to near `high`, closer together at the lower end."""
    return [low + (high - low) * ((index + 0.75) / count) ** 1.5 * 0.98 for index in range(count)]


def _allocations(
    space: SearchSpace, table: SensitivityTable, reductions: Iterable[float], max_latency_s: float | None
) -> Iterator[tuple[DesignPoint, str]]:
    """Points of least predicted divergence, with the reason for each."""
    limit = "" if max_latency_s is None else ", within the limit on predicted latency"
    for index, reduction in enumerate(reductions):
        if index % 2 and (timed := allocated_for_latency(space, table, reduction, max_latency_s)) is not None:
            yield timed[0], f"least divergence by the sensitivity profile {timed[1]}{limit}"
        elif (point := allocated_point(space, table, reduction, max_latency_s)) is not None:
            yield point, f"least divergence by the sensitivity profile {_at_reduction(space, point)}{limit}"


def _at_reduction(space: SearchSpace, point: DesignPoint) -> str:
    return f"at a reduction of {100 * point_cost(space.topology, point).reduction:.1f} %"


def _uniform(
    space: SearchSpace, table: SensitivityTable, reductions: Iterable[float]
) -> Iterator[tuple[DesignPoint, str]]:
    """Points with every unit at the same kept fraction, for each reduction the nearest one that the table offers.

    Of options with equal kept fractions, such as ranks and a width, the one with the least divergence is taken.
    """
    allowed = [[o for o in options if not o.removes_block] for options in constraints_of(space).allowed_options(table)]
    kept_fractions = {round(o.parameters / options[0].parameters, 2) for options in allowed for o in options[1:]}
    points = []
    for kept in sorted(kept_fractions):
        choices: list[tuple[str, TensorChoice]] = []
        for dense, *decomposed in allowed:
            if decomposed:
                near = {o: round(abs(o.parameters / dense.parameters - kept), 3) for o in decomposed}
                choices += min(decomposed, key=lambda o: (near[o], o.divergence)).choices
        points.append(DesignPoint(tuple(choices)))
    for reduction in reductions:
        if points:
            point = min(points, key=lambda point: abs(point_cost(space.topology, point).reduction - reduction))
            yield point, f"every block at the same kept fraction, {_at_reduction(space, point)}"


def _removals(
    space: SearchSpace, table: SensitivityTable, reductions: Iterable[float]
) -> Iterator[tuple[DesignPoint, str]]:
    """Points that only remove blocks, those of least divergence."""
    constraints = replace(constraints_of(space), removals_only=True)
    for reduction in reductions:
        try:
            point = allocate(table, reduction=reduction, constraints=constraints).point
        except AllocationError:
            return
        yield point, f"removal of the blocks with the least divergence, {_at_reduction(space, point)}"


def _is_feasible(space: SearchSpace, point: DesignPoint) -> bool:
    try:
        return space.is_feasible(point)
    except PointError:  # not applicable to the model
        return False


def _point(space: SearchSpace, proposal: Proposal) -> DesignPoint:
    return space.point(proposal.levels) if proposal.point is None else proposal.point
