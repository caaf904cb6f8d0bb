"""Widths of MLPs in search spaces, allocations and proposals."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from space_support import all_points, space_of
from tiny_models import tiny_model

from dse.cost import point_cost, point_problems
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError
from dse.models import topology_of
from dse.search.refinement import FrontPoint, refine
from dse.search.refitted_sensitivities import RefittedSensitivities
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import level_table
from dse.search.warm_starts import warm_starts
from dse.sensitivity.allocation import allocate

TWO_LAYERS = topology_of(tiny_model("llama", num_hidden_layers=2))
GPT2 = topology_of(tiny_model("gpt2"))
GROUPS = {"roles": {"attention": ["query", "key", "value", "attention_output"], "mlp": ["gate", "up", "down"]}}
LEVELS = {"ranks": {"kept_fractions": [0.7, 0.4], "multiple": 4}, "groups": GROUPS, "widths": True}
DEPTH = {
    "kind": "depth_profile",
    "ranks": {"kept_fractions": [0.9, 0.7, 0.5, 0.3], "multiple": 4},
    "widths": True,
    "removal": True,
}


def level_space(**changes: Any) -> LevelSpace:
    space = space_of(TWO_LAYERS, **{**LEVELS, **changes})
    assert isinstance(space, LevelSpace)
    return space


def depth_space(**changes: Any) -> DepthProfileSpace:
    space = space_of(TWO_LAYERS, **{**DEPTH, **changes})
    assert isinstance(space, DepthProfileSpace)
    return space


@pytest.mark.parametrize("removal", [False, True])
def test_levels_with_widths_against_brute_force(removal: bool) -> None:
    space = level_space(removal=removal)
    points = all_points(space)
    assert space.number_of_points() == len(points)
    assert (
        space.number_of_configurations()
        == math.prod(space.dimensions.values())
        == (3 + removal) ** 2 * (5 + removal) ** 2
    )
    for point in points.values():
        assert space.point(space.levels_of(point)) == point
        assert point_problems(TWO_LAYERS, point) == []
    reductions = [point_cost(TWO_LAYERS, point).reduction for point in points.values() if not point.is_dense]
    assert space.reduction_range() == pytest.approx((min(reductions), max(reductions)), abs=1e-12)
    assert space.largest_ranks()["width"] == {"layers.0.mlp": 32, "layers.1.mlp": 32}
    assert {width for point in points.values() for width in point.widths.values()} == {32, 16}


def test_levels_are_ordered_by_their_parameters() -> None:
    """Ranks and widths take turns: at equal kept fractions they remove about the same number of parameters."""
    group = next(group for group in level_space().groups if group.mlps)
    saved = [group.saved("svd", level) for level in group.levels("svd")]
    assert saved == sorted(saved)
    kinds = [next(iter(group.choices("svd", level).values())).method for level in group.levels("svd")]
    assert sorted(kinds) == ["svd", "svd", "width", "width"]
    assert kinds[:2] != kinds[2:] or kinds[0] != kinds[1]


def test_groups_that_are_not_whole_mlps_have_no_widths() -> None:
    together = level_space(groups={})
    assert together.describe()["reducible_mlps"] == 0
    assert level_space(roles=["query", "up", "down"]).describe()["reducible_mlps"] == 0
    found = level_space().describe()
    assert found["reducible_mlps"] == 2
    assert found["ranks"]["mlp"] == [16, 32]
    fused = space_of(topology_of(tiny_model("phi3")), **{**LEVELS, "groups": {"roles": {"mlp": ["gate_up", "down"]}}})
    assert fused.describe()["reducible_mlps"] == 3


def test_points_outside_the_levels_are_refused_and_have_nearest_levels() -> None:
    space = level_space()
    odd = DesignPoint.of({"layers.0.mlp": TensorChoice("width", 20)})
    with pytest.raises(PointError, match=r"'layers\.0\.mlp' has width \[20\]; its levels are .*width \[32\]"):
        space.levels_of(odd)
    nearest = space.point(space.nearest_levels(odd))
    saved = [1 - point_cost(TWO_LAYERS, point).parameters / TWO_LAYERS.parameters_dense for point in (odd, nearest)]
    assert saved[0] == pytest.approx(saved[1], abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"absolute": [4]}}, "`widths` needs `ranks.kept_fractions`"),
        ({"kind": "subset", "groups": {}}, "`widths` are not for `kind: subset`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        level_space(**changes)


def test_all_forms_compete_in_one_integer_programme() -> None:
    """The allocation over ranks, widths and removals is the best of all combinations, by brute force."""
    space = level_space(removal=True)
    table = level_table(space, "svd")
    generator = np.random.default_rng(1)
    random_factors = {(u.name, o.choices): generator.uniform(0.2, 2) for u in table.units for o in u.options}
    table = table.scaled(lambda unit, option: random_factors[unit.name, option.choices])
    every = list(itertools.product(*(unit.options for unit in table.units)))
    forms = set()
    for reduction in (0.02, 0.05, 0.1, 0.15, 0.2):
        found = allocate(table, reduction=reduction)
        feasible = [
            sum(option.divergence for option in options)
            for options in every
            if table.reduction_of(
                table.parameters_dense
                - sum(u.dense.parameters - o.parameters for u, o in zip(table.units, options, strict=True))
            )
            >= reduction
        ]
        assert found.divergence == pytest.approx(min(feasible), rel=1e-4)
        forms |= {choice.method for _, choice in found.point}
    assert {"svd", "width"} <= forms


def test_a_depth_profile_allocates_widths() -> None:
    space = depth_space()
    table = space.table.scaled(lambda _unit, option: 0.5 if option.narrows_mlp else 1.0)
    point = space.with_table(table).point({**space.dense_levels, "budget": 40})
    assert point.widths
    assert all(width % 4 == 0 for width in point.widths.values())
    assert set(space.largest_ranks()) == {"svd", "width"}
    assert space.levels_of(point)["budget"] > 0
    without = depth_space(widths=False)
    assert not any(option.narrows_mlp for unit in without.table.units for option in unit.options)
    with pytest.raises(PointError, match=r"'layers\.0\.mlp' has method width"):
        without.levels_of(DesignPoint.of({"layers.0.mlp": TensorChoice("width", 16)}))


def test_a_dense_role_excludes_the_widths_of_its_mlp() -> None:
    space = depth_space(keep_roles=["down"], removal=False)
    assert not any(name.endswith("mlp") for ranks in space.largest_ranks().values() for name in ranks)
    table = space.table.scaled(lambda _unit, option: 0.01 if option.narrows_mlp else 1.0)
    point = space.with_table(table).point({**space.dense_levels, "budget": 50})
    assert not point.is_dense
    assert not point.widths


def test_proposals_contain_widths() -> None:
    """Warm starts, refinement and random draws all propose them."""
    space = level_space(limits={"reduction": {"min": 0.02, "max": 0.6}})
    table = level_table(space, "svd").scaled(lambda _unit, option: 0.5 if option.narrows_mlp else 1.0)
    starts = [space.point(proposal.levels) for proposal in warm_starts(space, table, 24)]
    assert any(point.widths for point in starts)
    generator = random.Random(0)
    front = [FrontPoint(0, DesignPoint.dense(), 0.0, 0.0)]
    front += [FrontPoint(i, p, point_cost(TWO_LAYERS, p).reduction, 0.1 * i) for i, p in enumerate(starts[:3], 1)]
    expected = RefittedSensitivities.unfitted(table).expected
    refined = [refine(space, front, {point.id for point in starts}, generator, expected) for _ in range(10)]
    assert any(space.point(proposal.levels).widths for proposal in refined if proposal is not None)
    drawn = [space.draw_feasible(generator) for _ in range(20)]
    assert any(space.point(levels).widths for levels in drawn if levels is not None)


def test_widths_of_conv1d_models() -> None:
    space = space_of(GPT2, **{**LEVELS, "groups": {"roles": {"mlp": ["up", "down"]}}, "roles": ["up", "down"]})
    points = list(itertools.islice(all_points(space).values(), 30))
    assert any(point.widths for point in points)
    assert all(point_problems(GPT2, point) == [] for point in points)
