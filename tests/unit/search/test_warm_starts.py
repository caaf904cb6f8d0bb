"""Depth profiles and warm starts: their points satisfy all constraints, and a resumed study proposes the same."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_support import Watcher, evaluated, interrupt, points_and_accuracies
from tiny_study import tiny_study
from topologies import topology_of_shapes

from dse.cli import main
from dse.config import parse_search_space
from dse.cost import point_cost, point_problems
from dse.design_point import DesignPoint
from dse.errors import ConfigError, PointError
from dse.model_parts import DecomposableTensor, RemovableBlock
from dse.models import load_topology
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.depth_profile import RESOLUTION, DepthProfileSpace, at_depth
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import level_table
from dse.search.warm_starts import allocated_point, warm_starts
from dse.study import Study, run_study
from dse.topology import Topology

ROLES = {"query": (32, 32), "up": (48, 32), "down": (32, 48)}
TOPOLOGY = topology_of_shapes([ROLES] * 5, other=2000)
PROFILE: dict[str, Any] = {
    "name": "profile",
    "kind": "depth_profile",
    "methods": ["svd"],
    "knots": 3,
    "ranks": {"kept_fractions": [0.8, 0.6, 0.4, 0.2]},
    "limits": {"reduction": {"min": 0.05, "max": 0.3}},
}


def profile_of(**changes: Any) -> DepthProfileSpace:
    space = SearchSpace.from_config(parse_search_space({**PROFILE, **changes}), TOPOLOGY)
    assert isinstance(space, DepthProfileSpace)
    return space


@given(
    st.integers(0, 10**6),
    st.sets(st.integers(0, 4), max_size=2),
    st.sets(st.sampled_from(["query", "down"]), max_size=1),
    st.sampled_from([["svd"], ["svd", "tucker_merged"]]),
)
@settings(max_examples=25, deadline=None)
def test_points_of_all_levels_satisfy_the_constraints(
    seed: int, keep_layers: set[int], keep_roles: set[str], methods: list[str]
) -> None:
    space = profile_of(keep_layers=sorted(keep_layers), keep_roles=sorted(keep_roles), methods=methods)
    generator = random.Random(seed)
    drawn = space.draw_feasible(generator)
    assert drawn is not None
    levels = {name: generator.randrange(size) for name, size in space.dimensions.items()}
    for chosen in (drawn, levels):
        point = space.point(chosen)
        if point.is_dense:
            assert chosen["budget"] == 0
            continue
        assert point_problems(TOPOLOGY, point) == []
        assert space.is_feasible(point)
        assert 0.05 - 0.005 <= point_cost(TOPOLOGY, point).reduction <= 0.3
        assert not {TOPOLOGY[name].layer for name, _ in point} & keep_layers
        assert not {TOPOLOGY[name].role for name, _ in point} & keep_roles
        assert {choice.method for _, choice in point} == {methods[chosen.get("method", 0)]}
        assert space.point(chosen) == point
        nearest = space.levels_of(point)
        assert list(nearest) == list(space.dimensions)
        # An option may overshoot the budget by more than one level, but not by much more.
        reached = point_cost(TOPOLOGY, space.point(nearest)).reduction
        assert reached == pytest.approx(point_cost(TOPOLOGY, point).reduction, abs=0.03)
    for candidate in warm_starts(space, space.table, 24):
        point = candidate.point or space.point(candidate.levels)
        assert space.is_feasible(point)
        assert not {TOPOLOGY[name].layer for name, _ in point} & keep_layers
        assert not {TOPOLOGY[name].role for name, _ in point} & keep_roles


def test_the_parameters_have_the_effects_of_their_names() -> None:
    space = profile_of()
    assert list(space.dimensions) == ["budget", "depth.0", "depth.1", "depth.2", "weight.mlp", "evenness"]
    assert space.number_of_configurations() == RESOLUTION**6
    assert space.number_of_points() == 5**10  # two blocks per layer, dense or at one of four kept fractions
    assert space.point(space.dense_levels) == DesignPoint.dense()
    middle = {**space.dense_levels, "budget": 50}
    budgets = [point_cost(TOPOLOGY, space.point({**middle, "budget": mark})).reduction for mark in (1, 25, 50, 75, 100)]
    assert budgets == sorted(budgets)
    assert budgets[0] == pytest.approx(0.05, abs=0.02)
    assert budgets[-1] == pytest.approx(0.3, abs=0.02)

    def removed(levels: dict[str, int], names: Any) -> int:
        point = space.point(levels)
        return sum(TOPOLOGY[n].parameters for n, _ in point if names(TOPOLOGY[n]))

    def is_mlp(tensor: DecomposableTensor) -> bool:
        return tensor.role != "query"

    def is_first(tensor: DecomposableTensor) -> bool:
        return tensor.layer == 0

    assert removed({**middle, "weight.mlp": 100}, is_mlp) < removed({**middle, "weight.mlp": 0}, is_mlp)
    assert removed({**middle, "depth.0": 100}, is_first) <= removed({**middle, "depth.0": 0}, is_first)
    concentrated, spread = (len(space.point({**middle, "evenness": mark})) for mark in (0, 100))
    assert concentrated <= spread


def test_points_are_counted_without_inapplicable_ones() -> None:
    blocks = tuple(
        RemovableBlock(f"layers.{i}.{role}", f"m.{i}.{role}", i, role, f"m.{i}", names, (), 4000, 4000, cache_kind=kind)
        for i in range(3)
        for role, names, kind in (
            ("attention", (f"layers.{i}.query",), ("full", "full", "sliding")[i]),
            ("mlp", (f"layers.{i}.up", f"layers.{i}.down"), ""),
        )
    )
    tensors = tuple(tensor for tensor in TOPOLOGY.tensors if (tensor.layer or 0) < 3)
    total = sum(t.parameters for t in tensors) + 20_000
    topology = Topology("Tiny", "tiny", 3, tensors, parameters_dense=total, blocks=blocks)
    config = {**PROFILE, "removal": True, "ranks": {"kept_fractions": [0.5]}, "limits": {}}
    space = SearchSpace.from_config(parse_search_space(config), topology)
    assert isinstance(space, DepthProfileSpace)
    grid = space.grid
    names, sizes = list(grid.dimensions), list(grid.dimensions.values())
    points = [grid.point(dict(zip(names, levels, strict=True))) for levels in itertools.product(*map(range, sizes))]
    assert sizes == [3] * 6
    assert space.number_of_points() == sum(not point_problems(topology, point) for point in points) < 3**6


def test_weights_are_interpolated_linearly_between_knots() -> None:
    assert [at_depth([0.0, 2.0, 0.0], layer, 5) for layer in range(5)] == [0.0, 1.0, 2.0, 1.0, 0.0]
    assert at_depth([1.0, 3.0], None, 5) == 0.0
    assert at_depth([1.0, 3.0], 0, 1) == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": {"layers": 2}}, "`groups` is for `kind: levels`"),
        ({"limits": {"reduction": {"min": 0.95}}}, "some point must lie within"),
        ({"keep_layers": [0, 1, 2, 3], "limits": {"reduction": {"min": 0.5}}}, "(keep_layers [0, 1, 2, 3])"),
    ],
)
def test_invalid_depth_profile_spaces_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        profile_of(**changes)
    assert words in str(caught.value)


def test_points_within_the_constraints_have_nearest_levels() -> None:
    space = profile_of(keep_layers=[0])
    own = DesignPoint.uniform(TOPOLOGY, "svd", 3, [1, 2])
    assert space.levels_of(own)["budget"] > 0
    for point in (DesignPoint.uniform(TOPOLOGY, "svd", 3, [0]), DesignPoint.uniform(TOPOLOGY, "tucker", 3, [1])):
        with pytest.raises(PointError, match="must be in search space 'profile'"):
            space.levels_of(point)


def test_allocations_in_a_level_space_are_points_of_the_space() -> None:
    config = {
        "name": "s",
        "methods": ["svd"],
        "groups": {"layers": 2, "roles": "separate"},
        "ranks": {"absolute": [2, 8]},
    }
    space = SearchSpace.from_config(parse_search_space(config), TOPOLOGY)
    assert isinstance(space, LevelSpace)
    table = level_table(space, "svd")
    found = warm_starts(space, table, 24)
    assert {candidate.origin for candidate in found} == {"allocation", "uniform"}
    assert all(candidate.point is None for candidate in found)
    reductions = [point_cost(TOPOLOGY, space.point(c.levels)).reduction for c in found if c.origin == "allocation"]
    assert reductions == sorted(reductions)
    # The least divergence, against random points of the space.
    point = allocated_point(space, table, 0.1)
    assert point is not None
    reached = point_cost(TOPOLOGY, point).reduction
    generator = random.Random(0)
    for _ in range(200):
        other = space.point({name: generator.choice((0, 0, 1, 2)) for name in space.dimensions})
        if point_cost(TOPOLOGY, other).reduction >= min(0.1, reached):
            assert table.divergence_of(other) >= table.divergence_of(point) - 1e-12


def test_an_unreachable_budget_has_no_allocation() -> None:
    space = profile_of()
    assert allocated_point(space, space.table, 0.9) is None


# --- whole studies ---


def warm_config(tiny_folder: Path, **changes: Any) -> dict[str, Any]:
    base = {"sampler": {"name": "tpe"}, "search": {"profile_tokens": 128}, "budget": {"trials": 18}}
    return tiny_study(tiny_folder, **{**base, **changes})


DEPTH: dict[str, Any] = {
    "name": "depth",
    "kind": "depth_profile",
    "methods": ["svd"],
    "knots": 3,
    "removal": True,
    "ranks": {"kept_fractions": [0.8, 0.5, 0.25]},
    "limits": {"reduction": {"min": 0.02, "max": 0.5}},
    "keep_layers": [1],
}


@pytest.mark.parametrize("kind", ["levels", "depth_profile"])
def test_warm_starts_come_first_and_a_resumed_study_proposes_the_same(
    tiny_folder: Path, tmp_path: Path, kind: str
) -> None:
    config = warm_config(tiny_folder, **({"space": DEPTH} if kind == "depth_profile" else {}))
    whole = run_study(config, out=tmp_path / "whole")
    records = evaluated(whole)
    origins = [record.origin for record in records]
    assert origins[:3] == ["dense", "allocation", "allocation"]
    assert "uniform" in origins[:10]
    assert set(origins[10:]) & {"sampler", "refined", "allocation", "repaired"}
    for record in records[1:]:
        assert 0.02 <= record.cost["reduction"] <= 0.5
        assert record.why or record.origin in ("sampler", "repaired")
        if kind == "depth_profile":
            assert not any(name.startswith("layers.1.") for name in record.point.by_name)
    for finished, when in ((3, "before"), (11, "during"), (14, "before"), (16, "during")):
        watcher = Watcher(**{when: {finished: interrupt}})  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "stopped", listener=watcher)
    assert points_and_accuracies(run_study(config, out=tmp_path / "stopped")) == points_and_accuracies(whole)


@pytest.fixture(scope="module")
def explained(tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        config = warm_config(tiny_folder, space=DEPTH, budget={"trials": 14})
        return run_study(config, out=tmp_path_factory.mktemp("explained") / "run")


def test_explain_prints_origin_and_ranks_of_a_trial(explained: Study, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(explained.folder.path)
    for record in evaluated(explained):
        assert main(["front", directory, "--explain", str(record.trial)]) == 0
        out = capsys.readouterr().out
        assert f"trial {record.trial}, point {record.point_id}" in out
        assert f"origin: {record.origin}" in out
        assert record.why in out
        found = explained.explain(record.trial)
        assert set(found.rank_map) == {0, 1, 2}
        for name, choice in record.point.by_name.items():
            layer, role = int(name.split(".")[1]), name.split(".")[2]
            if choice.is_removal:
                assert "removed" in found.rank_map[layer].values()
            else:
                assert found.rank_map[layer][role] == str(choice.rank)
        assert set(found.rank_map[1].values()) == {"."}
    assert main(["front", directory, "--explain", "99"]) == 2
    assert "a trial must be one of this study's" in capsys.readouterr().err


def test_the_page_has_a_rank_map_of_every_front_point(explained: Study) -> None:
    page = explained.folder.front_html.read_text()
    maps = {entry.trial: entry for entry in explained.point_maps}
    drawn = [record for record in explained.front_records if not record.is_dense]
    assert drawn
    assert list(maps) == [t for t in explained.front()["trial"] if t in maps]
    assert set(maps) == {record.trial for record in drawn}
    topology = load_topology(str(explained.config.model.ref))
    for record in drawn:
        entry = maps[record.trial]
        assert f'<figure id="map-{record.trial}"' in page
        assert f'<a href="#map-{record.trial}">{record.trial}</a>' in page
        assert f"Origin: {record.origin} (" in page
        assert (entry.layers, len(entry.roles)) == (("0", "1", "2"), len(topology.roles))
        # The cells have the point's ranks, and their shares of parameters add up to the model's.
        kept = 0.0
        for role, cells in zip(entry.roles, entry.cells, strict=True):
            for layer, cell in zip(entry.layers, cells, strict=True):
                assert cell is not None
                assert cell.parameter_ratio is not None
                kept += cell.parameter_ratio * topology[f"layers.{layer}.{role}"].parameters
                assert cell.is_removed or bool(cell.rank) == (f"layers.{layer}.{role}" in record.point.by_name)
        point = record.point
        blocks = [topology.blocks_by_name[name] for name in point.removed]
        passed = topology.passed_layers(point.removed)
        # Norms are removed with their blocks, and the rest of a layer without both; the map shows tensors only.
        beside = sum(b.parameters - sum(topology[t].parameters for t in b.tensors) for b in blocks)
        beside += sum({b.layer: b.rest_parameters for b in blocks if b.layer in passed}.values())
        saved = sum(tensor.parameters for tensor in topology.tensors) - kept
        assert saved + beside == pytest.approx(topology.parameters_dense - record.cost["parameters"], abs=0.5)


def test_warm_starts_can_be_switched_off(tiny_folder: Path, tmp_path: Path) -> None:
    config = warm_config(tiny_folder, space=DEPTH, search={"warm_starts": False}, budget={"trials": 8})
    origins = {record.origin for record in run_study(config, out=tmp_path / "run").records}
    assert not origins & {"allocation", "uniform", "removal"}
    assert "spread" in origins
