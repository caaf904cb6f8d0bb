"""Choice of a point on arrays."""

from __future__ import annotations

import numpy as np
import pytest

from dse.pareto import Candidates, PointChoice, choose_point


def candidates(*rows: tuple[float, float, float, tuple[float, ...]]) -> Candidates:
    """Rows of (drop, upper end of the drop, reduction, cost ratios)."""
    drop, high, reduction, ratios = zip(*rows, strict=True)
    return Candidates(np.array(drop), np.array(high), np.array(reduction), np.array(ratios))


def test_cheapest_certified_candidate_is_found_next_to_the_cheapest_by_point_estimate() -> None:
    found = candidates((0.005, 0.015, 0.1, (0.9,)), (0.015, 0.025, 0.2, (0.8,)), (0.04, 0.05, 0.3, (0.5,)))
    assert choose_point(found, 0.02) == PointChoice(best=1, fits=True, certified=0)
    assert choose_point(found, 0.03) == PointChoice(best=1, fits=True, certified=1)
    assert choose_point(found, 0.01) == PointChoice(best=0, fits=True, certified=None)


def test_without_an_interval_nothing_is_certified() -> None:
    assert choose_point(candidates((0.0, np.nan, 0.1, (0.9,))), 0.5) == PointChoice(0, True, None)


def test_cost_is_the_geometric_mean_and_ties_go_to_the_smaller_drop() -> None:
    found = candidates((0.01, 0.02, 0.1, (0.5, 0.98)), (0.01, 0.02, 0.1, (0.7, 0.72)), (0.0, 0.01, 0.1, (0.98, 0.5)))
    assert found.cost == pytest.approx(np.sqrt([0.49, 0.504, 0.49]))
    assert choose_point(found, 0.02).best == 2


def test_nearest_miss_has_the_smallest_total_excess_and_saves_something() -> None:
    found = candidates((0.04, 0.05, 0.1, (0.9,)), (0.03, 0.05, 0.1, (0.9,)), (0.0, 0.0, 0.3, (1.0,)))
    assert choose_point(found, 0.02) == PointChoice(best=1, fits=False, certified=None)
    assert choose_point(found, 0.02, min_reduction=0.5).best == 1
    assert found.saves.tolist() == [True, True, False]


def test_limits_are_inclusive_despite_rounding() -> None:
    assert choose_point(candidates((0.61 - 0.59, 0.61 - 0.59, 0.1, (0.9,))), 0.02, 0.1) == PointChoice(0, True, 0)
