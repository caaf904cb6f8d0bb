"""Refined points are feasible, new, near the goal's reduction, and prefer a low expected divergence."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import topology_of_shapes

from dse.config import parse_search_space
from dse.cost import point_cost
from dse.design_point import DesignPoint
from dse.search.refinement import FrontPoint, draw_goal, refine
from dse.search.spaces.base import SearchSpace

ROLES = {"query": (16, 16), "up": (32, 16), "down": (16, 32)}
TOPOLOGY = topology_of_shapes([ROLES] * 6, other=500)
LEVELS: dict[str, Any] = {
    "groups": {"layers": 1, "roles": {"attention": ["query"], "mlp": ["up", "down"]}},
    "ranks": {"absolute": [1, 3, 5]},
}
SUBSET: dict[str, Any] = {"kind": "subset", "ranks": {"absolute": [1, 4]}}


def space_of(**config: Any) -> SearchSpace:
    return SearchSpace.from_config(parse_search_space({"name": "s", "methods": ["svd"], **config}), TOPOLOGY)


def front_of(space: SearchSpace, seed: int, size: int = 4) -> list[FrontPoint]:
    generator = random.Random(seed)
    members = [FrontPoint(0, DesignPoint.dense(), 0.0, 0.0)]
    for trial in range(1, size + 1):
        levels = space.draw_feasible(generator)
        assert levels is not None
        point = space.point(levels)
        reduction = point_cost(TOPOLOGY, point).reduction
        members.append(FrontPoint(trial, point, reduction, reduction**2))
    return members


@given(
    st.sampled_from([LEVELS, SUBSET]),
    st.tuples(st.floats(0, 0.6), st.floats(0.1, 0.3)),
    st.sets(st.integers(0, 5), max_size=3),
    st.sets(st.sampled_from(["query", "down"]), max_size=1),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_refined_points_satisfy_all_constraints_and_are_new(
    kind: dict[str, Any], limits: tuple[float, float], keep_layers: set[int], keep_roles: set[str], seed: int
) -> None:
    low, high = limits[0] / 2, limits[0] / 2 + limits[1]
    try:
        space = space_of(
            **kind,
            limits={"reduction": {"min": low, "max": high}},
            keep_layers=sorted(keep_layers),
            keep_roles=sorted(keep_roles),
        )
    except Exception as error:  # noqa: BLE001 - the limits may be out of reach
        assert "some point must lie within" in str(error)  # noqa: PT017
        return
    front = front_of(space, seed)
    seen = {entry.point.id for entry in front}
    generator = random.Random(seed)
    for _ in range(4):
        found = refine(space, front, seen, generator)
        if found is None:
            continue
        point = space.point(found.levels)
        assert point.id not in seen
        assert not point.is_dense
        assert low <= point_cost(TOPOLOGY, point).reduction <= high
        names = [TOPOLOGY[name] for name, _ in point]
        assert not {t.layer for t in names} & keep_layers
        assert not {t.role for t in names} & keep_roles
        assert found.origin == "refined"
        assert "trial" in found.why
        seen.add(point.id)


def test_refinement_is_deterministic() -> None:
    space = space_of(**LEVELS)
    front = front_of(space, 3)
    first, second = (refine(space, front, set(), random.Random(7)) for _ in range(2))
    assert first == second
    assert first is not None
    shuffled = refine(space, front[::-1], set(), random.Random(7))
    assert shuffled == first


def test_refined_points_are_near_the_reduction_of_the_goal() -> None:
    space = space_of(**LEVELS)
    front = front_of(space, 5, size=2)
    missed = []
    for seed in range(30):
        found, goal = refine(space, front, set(), random.Random(seed)), draw_goal(front, random.Random(seed))
        assert found is not None
        missed.append(abs(point_cost(TOPOLOGY, space.point(found.levels)).reduction - goal.reduction))
    smallest_step = min(
        abs(point_cost(TOPOLOGY, space.point({**space.dense_levels, name: 1})).reduction) for name in space.dimensions
    )
    assert sorted(missed)[len(missed) // 2] < smallest_step


def test_low_expected_divergence_is_preferred() -> None:
    space = space_of(**LEVELS)
    front = front_of(space, 1)

    def divergence(point: DesignPoint) -> float:
        """Only layers 0 to 2 matter."""
        return sum((TOPOLOGY[name].layer or 0) < 3 for name, _ in point)

    def mean(**keywords: Any) -> float:
        found = [refine(space, front, set(), random.Random(seed), **keywords) for seed in range(25)]
        return sum(divergence(space.point(entry.levels)) for entry in found if entry is not None) / 25

    assert mean(divergence=divergence) < mean() - 0.5


def test_without_a_front_point_in_the_space_nothing_is_refined() -> None:
    space = space_of(**LEVELS)
    assert refine(space, [FrontPoint(0, DesignPoint.dense(), 0.0, 0.0)], set(), random.Random(0)) is None
    outside = DesignPoint.uniform(TOPOLOGY, "svd", 2)
    assert refine(space, [FrontPoint(1, outside, 0.5, 1.0)], set(), random.Random(0)) is None


def test_goals_prefer_wide_gaps() -> None:
    space = space_of(**LEVELS)
    point = front_of(space, 1)[1].point
    front = [FrontPoint(t, point, r, r) for t, r in enumerate((0.05, 0.06, 0.07, 0.30))]
    goals = [draw_goal(front, random.Random(seed)) for seed in range(200)]
    middles = [goal.reduction for goal in goals if "gap" in goal.why]
    assert 60 < len(middles) < 140
    assert middles.count(pytest.approx(0.185)) > 0.9 * len(middles)
