"""Search spaces against brute force on small models, and the shipped spaces on the configs of real models."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from space_support import BRUTE, UNEVEN, UNIFORM, all_points, small_space, space_of, spaces
from topologies import PUBLISHED, save_published_config, topology_of_shapes

from dse.config import RankConfig, load_search_space, load_study
from dse.cost import break_even_rank, factor_parameters, has_core, point_cost, point_problems
from dse.design_point import METHOD_NAMES, DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError
from dse.model_parts import DecomposableTensor
from dse.models import load_topology
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.rank_levels import rank_at
from dse.search.spaces.scope import KNOWN_ROLES
from dse.search.start_up_points import first_points, unseen_feasible_levels
from dse.topology import Topology
from dse.trial.objectives import resolve_objectives

ROOT = Path(__file__).resolve().parents[3]


@given(spaces())
@BRUTE
def test_points_are_counted_exactly_and_have_levels(drawn: tuple[Topology, dict[str, Any]]) -> None:
    space = small_space(drawn)
    points = all_points(space)
    assert space.number_of_points() == len(points)
    assert space.number_of_configurations() == math.prod(space.dimensions.values())
    for point in points.values():
        levels = space.levels_of(point)
        assert list(levels) == list(space.dimensions)
        assert all(0 <= levels[name] < size for name, size in space.dimensions.items())
        assert space.point(levels) == point
        # All ranks are at most break-even, so all points are applicable.
        assert point_problems(space.topology, point) == []


@given(spaces())
@BRUTE
def test_reduction_range_and_largest_ranks(drawn: tuple[Topology, dict[str, Any]]) -> None:
    space = small_space(drawn)
    points = [point for point in all_points(space).values() if not point.is_dense]
    reductions = [point_cost(space.topology, point).reduction for point in points]
    smallest, largest = space.reduction_range()
    assert smallest == pytest.approx(min(reductions), abs=1e-12)
    assert largest == pytest.approx(max(reductions), abs=1e-12)
    ranks: dict[str, dict[str, int]] = {method: {} for method in space.config.methods}
    for point in points:
        for name, choice in point:
            ranks[choice.method][name] = max(choice.rank, ranks[choice.method].get(name, 0))
    assert space.largest_ranks() == ranks
    assert set(space.tensor_names()) == {name for of_method in ranks.values() for name in of_method}


LIMITS = st.tuples(st.floats(-0.1, 1), st.floats(-0.1, 1), st.sampled_from(["both", "both", "min", "max", "none"]))


@given(spaces(), LIMITS, st.integers(0, 2**32))
@BRUTE
def test_draws_and_repairs_are_feasible(
    drawn: tuple[Topology, dict[str, Any]], ends: tuple[float, float, str], seed: int
) -> None:
    low, high, which = min(ends[:2]), max(ends[:2]), ends[2]
    limits = {"min": low} if which in ("both", "min") else {}
    limits |= {"max": high} if which in ("both", "max") else {}
    topology, config = drawn
    space = small_space((topology, {**config, "limits": {"reduction": limits}}))
    points = all_points(space)
    feasible = {
        identity
        for identity, point in points.items()
        if limits.get("min", -9) <= point_cost(topology, point).reduction <= limits.get("max", 9) and not point.is_dense
    }
    assert feasible == {i for i, point in points.items() if space.is_feasible(point) and not point.is_dense}
    if not feasible:
        with pytest.raises(ConfigError, match="some point must lie within"):
            space.check_limits()
        return
    space.check_limits()
    generator = random.Random(seed)
    for _ in range(3):
        levels = space.draw_feasible(generator)
        assert levels is not None
        assert space.point(levels).id in feasible
    proposed = {name: generator.randrange(size) for name, size in space.dimensions.items()}
    repaired = space.repair(proposed, generator)
    assert repaired is None or space.point(repaired).id in feasible
    if space.point(proposed).id in feasible:
        assert repaired == proposed
    # An unseen point is found as long as there is one.
    seen = {DesignPoint.dense().id}
    for _ in range(min(12, len(feasible))):
        levels = unseen_feasible_levels(space, seen, generator)
        assert levels is not None
        assert space.point(levels).id in feasible - seen
        seen.add(space.point(levels).id)
    assert unseen_feasible_levels(space, feasible, generator) is None


@given(spaces(), st.integers(0, 60), st.integers(0, 9))
@BRUTE
def test_first_points(drawn: tuple[Topology, dict[str, Any]], trials: int, seed: int) -> None:
    space = small_space(drawn)
    own = [point for point in itertools.islice(all_points(space).values(), 4) if not point.is_dense]
    proposals = first_points(space, own, seed=seed, trials=trials)
    points = [space.point(levels) for levels, _ in proposals]
    assert points[: len(own)] == own
    assert len({point.id for point in points}) == len(points)
    assert all(space.is_feasible(point) and not point.is_dense for point in points)
    start_up = len(points) - len(own)
    assert start_up <= max(0, trials // 3 - len(own))
    if trials == 0:
        assert start_up == 0
    assert proposals == first_points(space, own, seed=seed, trials=trials)


# --- closed forms -----------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(METHOD_NAMES),
    st.integers(1, 100).map(lambda percent: percent / 100),
    st.sampled_from([1, 2, 8, 64]),
)
@settings(deadline=None)
def test_a_kept_fraction_yields_the_largest_rank_within_it(
    m: int, n: int, method: str, kept: float, multiple: int
) -> None:
    tensor = DecomposableTensor("t", "t", 0, "up", m, n)
    limit = break_even_rank(m, n, core=has_core(method))
    budget = Fraction(round(kept * 100), 100) * m * n
    fitting = [r for r in range(1, limit + 1) if factor_parameters(tensor, TensorChoice(method, r)) <= budget]
    snapped = [r for r in fitting if r % multiple == 0]
    expected = max(snapped, default=min(multiple, limit))
    assert rank_at(RankConfig(kept_fractions=[kept], multiple=multiple), 0, tensor, method) == expected


def test_kept_fractions_on_known_shapes() -> None:
    square, core = DecomposableTensor("t", "t", 0, "up", 4096, 4096), RankConfig(kept_fractions=[0.25, 0.5])
    # r(m + n) = f mn yields r = f n / 2 for a square matrix; levels go from the largest fraction to the smallest.
    assert [rank_at(core, i, square, "svd") for i in (0, 1)] == [1024, 512]
    # With a core, r^2 + 2nr = n^2 / 2 yields r = (sqrt(3/2) - 1) n = 920.57.
    assert rank_at(core, 0, square, "tucker") == 920
    assert rank_at(RankConfig(kept_fractions=[0.5], multiple=64), 0, square, "tucker") == 896


def test_absolute_ranks_are_capped_at_break_even_and_rounded_to_multiples() -> None:
    tensor = DecomposableTensor("t", "t", 0, "up", 10, 10)
    grid = RankConfig(absolute=[1, 100, 4])
    assert [rank_at(grid, i, tensor, "svd") for i in range(3)] == [5, 4, 1]
    assert [rank_at(RankConfig(absolute=[1, 100, 4], multiple=2), i, tensor, "svd") for i in range(3)] == [4, 4, 2]


def test_levels_with_equal_ranks_are_merged() -> None:
    space = space_of(topology_of_shapes([{"query": (4, 4)}, {"query": (30, 30)}]), ranks={"absolute": [20, 10, 2, 1]})
    # Break-even is 2 for 4 x 4 and 15 for 30 x 30: ranks 2 and 1 remain there, and 15, 10, 2, 1 here.
    assert dict(space.dimensions) == {"layers.0": 3, "layers.1": 5}
    assert space.number_of_points() == 15


def test_dimensions_of_groups() -> None:
    together = space_of(UNIFORM, groups={"layers": 2})
    assert dict(together.dimensions) == {"layers.0-1": 2, "layers.2": 2}
    separate = space_of(UNIFORM, groups={"roles": "separate"}, layers=[0, 2], roles=["up", "query"])
    assert list(separate.dimensions) == ["layers.0.up", "layers.0.query", "layers.2.up", "layers.2.query"]
    named = space_of(UNIFORM, groups={"layers": 3, "roles": {"attention": ["query", "key"], "mlp": ["up", "gate"]}})
    assert list(named.dimensions) == ["layers.0-2.attention", "layers.0-2.mlp"]
    methods = space_of(UNIFORM, methods=["svd", "tucker"], layers={"skip_first": 1, "skip_last": 1})
    assert dict(methods.dimensions) == {"method": 2, "layers.1": 2}
    subset = space_of(UNIFORM, kind="subset", methods=["svd", "tucker"], ranks={"absolute": [1, 2]}, roles=["up"])
    assert list(subset.dimensions) == ["layers.0", "layers.1", "layers.2", "roles.up", "rank", "method"]


def test_a_tensor_outside_the_layers_forms_its_own_group() -> None:
    topology = topology_of_shapes([{"up": (6, 6)}], {"head": (20, 6)})
    space = space_of(topology)
    assert list(space.dimensions) == ["layers.0", "head"]
    assert space.point({"layers.0": 0, "head": 1}).by_name.keys() == {"head"}
    with pytest.raises(ConfigError, match="must hold at least one tensor of Tiny, but holds none"):
        space_of(topology, kind="subset", roles=["head"])


def test_uniform_points_change_one_role_group_at_a_time() -> None:
    groups = {"layers": 2, "roles": {"attention": ["query", "key"], "mlp": ["up"]}}
    space = space_of(UNIFORM, groups=groups, ranks={"absolute": [1, 2]})
    uniform = [space.point(levels) for levels in space.uniform_points()]
    expected = [
        DesignPoint.uniform(UNIFORM, "svd", rank, "all", roles)
        for rank, roles in ((2, ["query", "key"]), (2, ["up"]), (1, ["query", "key"]), (1, ["up"]))
    ]
    assert uniform == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": [0, 3]}, "`0 <= layer < 3` must hold for Tiny, but space 's' names layer 3"),
    ({"layers": [-1]}, "`0 <= layer < 3` must hold"),
    ({"layers": []}, "must name at least one layer"),
    ({"layers": {"skip_first": 2, "skip_last": 1}}, "must leave at least one of 3 layers"),
    ({"roles": ["querry"]}, "space 's' names 'querry'; did you mean 'query'?"),
    ({"roles": ["gate"]}, "must name a role of Tiny"),
    ({"roles": []}, "must name a role of Tiny"),
    ({"groups": {"roles": {"a": ["up"], "b": ["up", "key"]}}}, "'up' is in several"),
    ({"groups": {"roles": {"a": ["upp"]}}}, "names 'upp'; did you mean 'up'?"),
    ({"groups": {"roles": {"a": ["gate"]}}}, "must hold at least one tensor"),
    ({"limits": {"reduction": {"min": 0.99}}}, "some point must lie within `limits.reduction`"),
    ({"limits": {"reduction": {"max": 0.0001}}}, "some point must lie within `limits.reduction`"),
    ({"limits": {"reduction": {"min": 0.0501, "max": 0.0502}}}, "some point must lie within `limits.reduction`"),
]


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        (kind, config, words)
        for kind in ("levels", "subset")
        for config, words in REFUSED
        if kind == "levels" or "groups" not in config
    ],
)
def test_a_space_that_does_not_fit_the_model_is_refused(kind: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(UNIFORM, kind=kind, **config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"method": "tucker", "rank": 1, "layers": [0]}, "svd"),
        ({"method": "svd", "rank": 2, "layers": [0]}, "has [2, 2, 2]; its levels are"),
        ({"method": "svd", "rank": 1, "layers": [1]}, "not among its tensors"),
        ({"method": "svd", "rank": 1, "layers": [0], "roles": ["up"]}, "has [1]; its levels are"),
        ({"tensors": {"layers.0.up": {"method": "svd", "rank": 1},
                      "layers.0.key": {"method": "tucker", "rank": 1}}}, "svd"),
    ],
)  # fmt: skip
def test_points_outside_the_space_have_no_levels(point: dict[str, Any], words: str) -> None:
    space = space_of(UNIFORM, layers=[0, 2])
    with pytest.raises(PointError, match="must be in search space 's'") as caught:
        space.levels_of(DesignPoint.from_json(point, UNIFORM))
    assert words in str(caught.value)
    subset = space_of(UNIFORM, kind="subset", layers=[0, 2], ranks={"absolute": [3]})
    with pytest.raises(PointError, match="must be in search space 's'"):
        subset.levels_of(DesignPoint.from_json(point, UNIFORM))


def test_constraint_values_are_signed_distances_to_the_limits() -> None:
    space = space_of(UNIFORM, limits={"reduction": {"min": 0.1, "max": 0.3}})
    point = DesignPoint.uniform(UNIFORM, "svd", 1, [0])
    reduction = point_cost(UNIFORM, point).reduction
    assert space.violations(point) == pytest.approx(
        {"reduction_min": 0.1 - reduction, "reduction_max": reduction - 0.3}
    )
    assert space.violations(DesignPoint.dense())["reduction_min"] == pytest.approx(0.1)
    assert not space.is_feasible(DesignPoint.dense())
    assert space_of(UNIFORM).violations(point) == {}


def test_description() -> None:
    description = space_of(UNEVEN, kind="subset", ranks={"absolute": [1, 9]}, methods=["tucker"]).describe()
    assert description["tensors"] == 5
    assert description["ranks"] == {"query": [1, 2], "up": [1, 2, 3], "down": [1, 2]}
    assert description["number_of_points_log2"] == pytest.approx(math.log2(description["number_of_points"]))


# --- the shipped files on the real models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Topology]:
    """Model references to topologies, from configs alone."""
    folder = tmp_path_factory.mktemp("configs")
    return {ref: load_topology(str(save_published_config(folder / str(i), ref))) for i, ref in enumerate(PUBLISHED)}


def test_the_configs_are_those_of_the_real_models(real_models: dict[str, Topology]) -> None:
    assert [topology.parameters_dense for topology in real_models.values()] == [
        6_738_415_616,
        8_030_261_248,
        596_049_920,
        134_515_008,
    ]


@pytest.mark.parametrize("name", ["quickstart", "moar2024_llama2_7b", "llama3_8b", "qwen3_0_6b"])
def test_every_study_describes_a_valid_space_on_its_model(name: str, real_models: dict[str, Topology]) -> None:
    study = load_study(ROOT / "studies" / f"{name}.yaml")
    topology = real_models[study.model.ref]
    space = SearchSpace.from_config(study.space, topology)
    own = [DesignPoint.from_json(entry, topology) for entry in study.enqueue]
    assert all(space.is_feasible(point) for point in own)
    proposals = first_points(space, own, seed=0, trials=study.budget.trials)
    assert len(proposals) >= min(study.budget.trials // 3, 4)
    for levels, _ in proposals:
        assert point_problems(topology, space.point(levels)) == []
        assert space.is_feasible(space.point(levels))
    assert len(space.tensor_names()) == len(topology.tensors)
    assert space.describe()["number_of_points"] > 10**6
    objectives, dropped = resolve_objectives(study, "there is no meter here")
    assert all("energy" in name for name in dropped)
    assert {"accuracy", "parameters"} <= {objective.name for objective in objectives}


@pytest.mark.parametrize("name", ["layer_rank", "layer_role_fisher", "layer_role_rank", "moar2024"])
def test_every_shipped_space_fits_every_model(name: str, real_models: dict[str, Topology]) -> None:
    for topology in real_models.values():
        space = SearchSpace.from_config(load_search_space(ROOT / "search_spaces" / f"{name}.yaml"), topology)
        smallest, largest = space.reduction_range()
        assert 0 < smallest < space.config.limits.reduction.max if space.config.limits.reduction.max else True
        assert largest > 0.5


def test_the_papers_space_on_its_model(real_models: dict[str, Topology]) -> None:
    topology = real_models["meta-llama/Llama-2-7b-chat-hf"]
    space = SearchSpace.from_file(ROOT / "search_spaces" / "moar2024.yaml", topology)
    assert space.number_of_configurations() == 2**39
    assert space.number_of_points() == (2**32 - 1) * (2**7 - 1) + 1
    assert len(space.dimensions) == 39
    # Rank 1 everywhere keeps the embeddings, the head and the norms.
    left = 2 * 32000 * 4096 + 65 * 4096 + sum(m + n + 1 for m, n in (t.shape for t in topology.tensors))
    assert space.reduction_range()[1] == pytest.approx(1 - left / topology.parameters_dense)


def test_the_papers_ten_layer_sets_are_in_the_space(real_models: dict[str, Topology]) -> None:
    study = load_study(ROOT / "studies" / "moar2024_llama2_7b.yaml")
    topology = real_models[study.model.ref]
    space = SearchSpace.from_config(study.space, topology)
    assert len(study.enqueue) == 10
    assert study.budget.trials == 11  # the dense model, and these
    for entry in study.enqueue:
        point = DesignPoint.from_json(entry, topology)
        levels = space.levels_of(point)
        assert space.point(levels) == point
        assert [int(name[7:]) for name in space.dimensions if name.startswith("layers.") and levels[name]] == entry[
            "layers"
        ]
    # The paper labels its sets by the reduction; the first is 6 %, the last 96 %.
    reductions = [point_cost(topology, DesignPoint.from_json(entry, topology)).reduction for entry in study.enqueue]
    assert reductions == sorted(reductions)
    assert [round(100 * r) for r in (reductions[0], reductions[-1])] == [6, 96]


def test_known_roles_cover_the_models(real_models: dict[str, Topology]) -> None:
    for topology in real_models.values():
        assert set(topology.roles) <= set(KNOWN_ROLES)
