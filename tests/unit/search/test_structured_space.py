"""Spaces with stacks and removed blocks, against brute force on small models, and on a real architecture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from space_support import BRUTE, all_points, small, space_of, structured_spaces
from tiny_models import tiny_model

from dse.config import load_search_space
from dse.cost import point_cost, point_problems
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError
from dse.models import topology_of
from dse.search.spaces.base import SearchSpace

ROOT = Path(__file__).resolve().parents[3]


@given(structured_spaces())
@BRUTE
def test_points_are_applicable_and_counted_exactly(space: SearchSpace) -> None:
    points = all_points(space)
    assert space.number_of_points() == len(points)
    for point in points.values():
        assert point_problems(space.topology, point) == []
        assert space.point(space.levels_of(point)) == point
        assert space.config.removal or not point.removed
        assert space.config.stacks or not any(name in space.topology.stacks_by_name for name, _ in point)


@given(structured_spaces(), st.integers(0, 2**32))
@BRUTE
def test_reach_ranks_draws_and_repairs(space: SearchSpace, seed: int) -> None:
    points = [point for point in all_points(space).values() if not point.is_dense]
    reductions = [point_cost(space.topology, point).reduction for point in points]
    assert space.reduction_range() == pytest.approx((min(reductions), max(reductions)), abs=1e-12)
    ranks: dict[str, dict[str, int]] = {method: {} for method in space.config.methods}
    for point in points:
        for name, choice in point:
            if not choice.is_removal:
                ranks[choice.method][name] = max(choice.rank, ranks[choice.method].get(name, 0))
    assert space.largest_ranks() == ranks
    generator = random.Random(seed)
    drawn = space.draw_feasible(generator)
    assert drawn is not None
    repaired = space.repair({n: generator.randrange(size) for n, size in space.dimensions.items()}, generator)
    for levels in (drawn, repaired):
        assert levels is None or not space.point(levels).is_dense


def test_stacks_are_ignored_by_default() -> None:
    """Without `stacks`, roles of stacks in a space are ignored."""
    roles = ["query", "key", "query_key_value", "up"]
    space = space_of(small(), roles=roles, groups={"roles": {"attention": roles[:3], "mlp": ["up"]}})
    assert space.dimensions == dict.fromkeys(
        ("layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"), 2
    )
    deepest = space.point(dict.fromkeys(space.dimensions, 1))
    assert set(deepest.by_name) == {f"layers.{i}.{role}" for i in (0, 1) for role in ("query", "key", "up")}


def test_a_stack_replaces_its_members() -> None:
    together = space_of(small(), stacks=True)
    assert set(together.tensor_names()) == {f"layers.{i}.{role}" for i in (0, 1) for role in ("query_key_value", "up")}
    separate = space_of(small(), stacks=True, groups={"roles": "separate"})
    assert [name for name in separate.dimensions if name.startswith("layers.0")] == [
        "layers.0.query_key_value",
        "layers.0.up",
    ]
    alone = space_of(small(), stacks=True, roles=["query", "up"])
    assert set(alone.tensor_names()) == {f"layers.{i}.{role}" for i in (0, 1) for role in ("query", "up")}
    with pytest.raises(ConfigError, match="a stack and its members must be in one group"):
        space_of(small(), stacks=True, groups={"roles": {"a": ["query"], "b": ["query_key_value"]}})


def test_the_last_level_of_a_group_removes_the_block_that_consists_of_it() -> None:
    roles = {"attention": ["query", "key"], "part": ["up"]}
    space = space_of(small(), removal=True, groups={"roles": roles})
    last = {name: size - 1 for name, size in space.dimensions.items()}
    # The attention of one layer stays, at its lowest rank.
    assert space.point(last) == DesignPoint.of(
        {name: TensorChoice.removal() for name in ("layers.0.attention", "layers.0.mlp", "layers.1.mlp")}
        | {f"layers.1.{role}": TensorChoice("svd", 1) for role in roles["attention"]}
    )
    part = space_of(small(), removal=True, groups={"roles": {"a": ["query"], "b": ["up"]}})
    assert part.dimensions["layers.0.a"] == 2
    assert part.dimensions["layers.0.b"] == 3
    wide = space_of(small(), removal=True, groups={"layers": 2, "roles": roles})
    with pytest.raises(PointError, match=r"it removes \['layers.0.mlp'\] only"):
        wide.levels_of(DesignPoint.of({"layers.0.mlp": TensorChoice.removal()}))


def test_a_subset_has_no_stacks_removal_or_widths() -> None:
    for key in ("stacks", "removal", "widths"):
        with pytest.raises(ConfigError, match="are not for `kind: subset`"):
            space_of(small(), kind="subset", **{key: True})


def test_a_shipped_space_with_stacks_and_removal_on_a_real_architecture() -> None:
    topology = topology_of(tiny_model(num_hidden_layers=4))
    shipped = load_search_space(ROOT / "search_spaces" / "layer_role_rank.yaml")
    changed = shipped.model_copy(update={"stacks": True, "removal": True})
    space = SearchSpace.from_config(changed, topology)
    point = space.point({name: size - 1 for name, size in space.dimensions.items()})
    assert point_problems(topology, point) == []
    assert "layers.3.query_key_value" in point.by_name
    assert {"layers.0.attention", "layers.0.mlp", "layers.3.mlp"} <= set(point.removed)
    assert space.levels_of(point)
    assert space.describe()["ranks"].keys() == {"query_key_value", "attention_output", "gate_up", "down"}
    plain = SearchSpace.from_config(shipped, topology)
    assert plain.reduction_range()[1] < space.reduction_range()[1]
