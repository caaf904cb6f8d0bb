"""Levels nearest to points outside a space, against exhaustive search."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from space_support import (
    BRUTE,
    UNEVEN,
    UNIFORM,
    all_points,
    small,
    small_space,
    space_of,
    spaces,
    structured_spaces,
)
from topologies import topology_of_shapes

from dse.config import parse_search_space
from dse.cost import break_even_rank, factor_parameters, has_core
from dse.design_point import DesignPoint, TensorChoice
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import block_table
from dse.search.spaces.table_space import TableSpace
from dse.topology import Topology


@given(spaces())
@BRUTE
def test_points_of_the_space_have_their_own_levels(drawn: tuple[Topology, dict[str, Any]]) -> None:
    space = small_space(drawn)
    for point in all_points(space).values():
        assert space.nearest_levels(point) == space.levels_of(point)


@st.composite
def foreign_points(draw: st.DrawFn, topology: Topology, names: tuple[str, ...]) -> DesignPoint:
    """Points with any method and rank for some of these tensors."""
    choices = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
        method = draw(st.sampled_from(["svd", "tucker", "whitened_svd"]))
        rank = draw(st.integers(1, break_even_rank(*topology[name].shape, core=has_core(method))))
        choices[name] = TensorChoice(method, rank)
    return DesignPoint.of(choices)


@given(st.data())
@BRUTE
def test_nearest_levels_save_the_most_similar_number_of_parameters(data: st.DataObject) -> None:
    space = small_space(data.draw(spaces().filter(lambda drawn: drawn[1]["kind"] == "levels")))
    assert isinstance(space, LevelSpace)
    topology = space.topology
    point = data.draw(foreign_points(topology, space.tensor_names()))
    found = space.point(space.nearest_levels(point))
    methods = {choice.method for _, choice in point} & set(space.config.methods)

    def saved(group: tuple[str, ...], of: DesignPoint) -> int:
        own = {name: choice for name, choice in of if name in group}
        return sum(topology[name].parameters - factor_parameters(topology[name], own[name]) for name in own)

    def distance(other: DesignPoint) -> int:
        groups = [tuple(matrix.name for matrix in group.matrices) for group in space.groups]
        return sum(abs(saved(group, point) - saved(group, other)) for group in groups)

    assert not methods or {choice.method for _, choice in found} <= methods
    method = next(iter({choice.method for _, choice in found}), None)
    rivals = [other for other in all_points(space).values() if {c.method for _, c in other} <= {method}]
    assert distance(found) <= min(map(distance, rivals))


@given(structured_spaces())
@BRUTE
def test_removed_blocks_have_the_levels_that_remove_them(space: SearchSpace) -> None:
    for point in all_points(space).values():
        if point.removed and not any(not choice.is_removal for _, choice in point):
            assert space.point(space.nearest_levels(point)) == point
    everything = DesignPoint.of({t: TensorChoice("tucker_merged", 1) for t in space.topology.by_name})
    assert set(space.nearest_levels(everything)) == set(space.dimensions)


def test_a_subset_has_the_changed_layers_and_roles_at_the_nearest_rank() -> None:
    space = space_of(UNIFORM, kind="subset", ranks={"absolute": [1, 3]})
    outside = DesignPoint.of({"layers.1.up": TensorChoice("tucker", 2), "layers.1.query": TensorChoice("svd", 1)})
    levels = space.nearest_levels(outside)
    assert {name for name, level in levels.items() if level} == {"layers.1", "roles.up", "roles.query", "rank"}
    # Of the ranks 1 and 3, 1 is nearer to ranks 2 and 1.
    assert space.point(levels).by_name["layers.1.up"] == TensorChoice("svd", 1)


def test_a_stack_counts_as_its_members() -> None:
    topology = small()
    space = space_of(
        topology, groups={"roles": {"attention": ["query", "key"], "mlp": ["up"]}}, ranks={"absolute": [1, 2]}
    )
    stacked = DesignPoint.of({"layers.0.query_key_value": TensorChoice("svd", 1)})
    levels = space.nearest_levels(stacked)
    assert {name for name, level in levels.items() if level} == {"layers.0.attention"}


@pytest.mark.parametrize("topology", [UNIFORM, UNEVEN, topology_of_shapes([{"query": (9, 9)}] * 2)])
def test_a_table_takes_the_options_of_the_most_similar_size(topology: Topology) -> None:
    config = parse_search_space(
        {"name": "t", "kind": "depth_profile", "methods": ["svd"], "ranks": {"absolute": [1, 2]}}
    )
    space = TableSpace(config, topology, block_table(config, topology))
    for wanted in (1, 2, 3):
        ranks = {t.name: min(wanted, break_even_rank(*t.shape, core=True)) for t in topology.tensors}
        point = DesignPoint.of({name: TensorChoice("tucker", rank) for name, rank in ranks.items()})
        found = space.nearest_levels(point)
        for unit in space.table.units:
            target = sum(factor_parameters(topology[name], point.by_name[name]) for name in unit.names)
            gaps = [abs(option.parameters - target) for option in unit.options]
            by_size = space.point({**space.dense_levels, unit.name: found[unit.name]})
            chosen = next(option for option in unit.options if DesignPoint(option.choices) == by_size)
            assert abs(chosen.parameters - target) == min(gaps)
