"""Search spaces and studies of mixture-of-experts models."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from space_support import BRUTE, all_points, space_of
from study_support import Watcher, evaluated
from tiny_models import EXPERT_FAMILIES, EXPERT_ROLES, save_tiny_model, tiny_model
from tiny_study import save_choice_task, tiny_study

from dse.cli import main
from dse.config import load_search_space
from dse.cost import factor_parameters, point_cost, point_problems
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError
from dse.expert_tensor import ExpertTensor
from dse.model_parts import DecomposableTensor, RemovableBlock
from dse.models import load_topology, topology_of
from dse.report.rank_map import placed_choices, rank_map_of
from dse.search.spaces.base import SearchSpace
from dse.study import run_study
from dse.topology import Topology

ROOT = Path(__file__).resolve().parents[3]
ATTENTION = ["query", "key", "value", "attention_output"]


def mixture(layers: int, experts: int, sizes: list[int], *, shared: bool) -> Topology:
    """Layers with a query, fused experts and optionally a tensor of a shared expert, with their MLP blocks."""
    tensors, fused, blocks = [], [], []
    m, n, inner = sizes
    for i in range(layers):
        own = [DecomposableTensor(f"layers.{i}.query", f"m.{i}.query", i, "query", m, n)]
        inside = [DecomposableTensor(f"layers.{i}.shared_up", f"m.{i}.mlp.up", i, "shared_up", m, n)] if shared else []
        of_layer = [
            ExpertTensor(f"layers.{i}.{role}", f"m.{i}.mlp.experts", role, i, role, experts, *shape, 1)
            for role, shape in zip(EXPERT_ROLES, ((2 * inner, n), (n, inner)), strict=True)
        ]
        tensors += [*own, *inside]
        fused += of_layer
        names, experts_inside = tuple(t.name for t in inside), tuple(t.name for t in of_layer)
        held = sum(t.parameters for t in (*inside, *of_layer))
        blocks.append(
            RemovableBlock(
                f"layers.{i}.mlp", f"m.{i}.mlp", i, "mlp", f"m.{i}", names, (), held, held, experts=experts_inside
            )
        )
    total = 50 + sum(t.parameters for t in (*tensors, *fused))
    return Topology(
        "Tiny", "tiny", layers, tuple(tensors), parameters_dense=total, blocks=tuple(blocks), experts=tuple(fused),
        other_matmul_parameters=sum(t.matmul_parameters for t in fused),
    )  # fmt: skip


GROUPS = ["together", "separate", {"attention": ["query"], "mlp": ["shared_up", *EXPERT_ROLES]}]


@st.composite
def expert_spaces(draw: st.DrawFn) -> SearchSpace:
    sizes = draw(st.lists(st.integers(4, 9), min_size=3, max_size=3))
    topology = mixture(draw(st.integers(1, 2)), draw(st.integers(3, 5)), sizes, shared=draw(st.booleans()))
    roles = draw(st.lists(st.sampled_from(["query", *EXPERT_ROLES]), min_size=1, max_size=3, unique=True))
    roles += ["shared_up"] if any(t.role == "shared_up" for t in topology.tensors) and draw(st.booleans()) else []
    ranks = draw(
        st.one_of(
            st.fixed_dictionaries({"absolute": st.lists(st.integers(1, 4), min_size=1, max_size=2, unique=True)}),
            st.fixed_dictionaries(
                {"kept_fractions": st.lists(st.sampled_from([0.3, 0.6, 0.8]), min_size=1, max_size=2, unique=True)}
            ),
        )
    )
    methods = st.lists(st.sampled_from(["svd", "tucker", "whitened_svd"]), min_size=1, max_size=2, unique=True)
    config: dict[str, Any] = {
        "methods": draw(methods),
        "roles": roles,
        "ranks": ranks,
        "groups": {"layers": draw(st.integers(1, 2)), "roles": draw(st.sampled_from(GROUPS[:2]))},
        "removal": draw(st.booleans()),
    }
    space = space_of(topology, check=False, **config)
    assume(space.number_of_configurations() <= 2000)
    return space


@given(expert_spaces(), st.integers(0, 2**32))
@BRUTE
def test_points_are_counted_exactly_and_experts_use_tucker_only(space: SearchSpace, seed: int) -> None:
    points = all_points(space)
    assert space.number_of_points() == len(points)
    for point in points.values():
        # With other methods, tiny tensors may not save anything even at rank 1; only problems of experts count here.
        assert not [p for p in point_problems(space.topology, point) if "expert" in str(p)]
        assert space.point(space.levels_of(point)) == point
        for name, choice in point:
            assert name not in space.topology.experts_by_name or choice == TensorChoice("tucker", choice.rank)
            assert space.config.removal or not choice.is_removal
    ranks: dict[str, dict[str, int]] = {}
    for point in points.values():
        for name, choice in point:
            if not choice.is_removal:
                known = ranks.setdefault(choice.method, {})
                known[name] = max(choice.rank, known.get(name, 0))
    assert space.largest_ranks() == ranks
    generator = random.Random(seed)
    repaired = space.repair({n: generator.randrange(size) for n, size in space.dimensions.items()}, generator)
    assert repaired is None or not space.point(repaired).is_dense


def test_kept_fractions_apply_to_the_fused_tensor() -> None:
    topology = topology_of(tiny_model("mixtral"))
    fractions = [0.9, 0.6, 0.3]
    space = space_of(
        topology, roles=EXPERT_ROLES, ranks={"kept_fractions": fractions}, groups={"roles": "separate"}, layers=[1]
    )
    for tensor in topology.experts[2:4]:
        for level, fraction in enumerate(fractions, 1):
            point = space.point({**space.dense_levels, f"layers.1.{tensor.role}": level})
            ((name, choice),) = point
            held = factor_parameters(tensor, choice)
            assert name == tensor.name
            assert held <= fraction * tensor.parameters
            following = tensor.factor_parameters(choice.rank + 1)
            assert following > fraction * tensor.parameters


def test_a_group_of_all_experts_of_a_layer_removes_its_block() -> None:
    topology = topology_of(tiny_model("mixtral"))
    groups = {"roles": {"mlp": EXPERT_ROLES, "attention": ATTENTION}}
    space = space_of(topology, roles=[*ATTENTION, *EXPERT_ROLES], groups=groups, removal=True, ranks={"absolute": [4]})
    assert space.dimensions == {f"layers.{i}.{kind}": 3 for i in range(3) for kind in ("mlp", "attention")}
    point = space.point({**space.dense_levels, "layers.1.mlp": 2})
    assert point == DesignPoint.of({"layers.1.mlp": TensorChoice.removal()})
    alone = space_of(topology, roles=["expert_down"], removal=True, ranks={"absolute": [4]})
    assert set(alone.dimensions.values()) == {2}  # half of a block cannot remove it


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_keep_experts_dense(family: str, path: Path) -> None:
    topology = topology_of(tiny_model(family))
    config = load_search_space(path)
    space = SearchSpace.from_config(config.model_copy(update={"limits": type(config.limits)()}), topology)
    assert space.roles
    assert not any("expert" in name for name in space.tensor_names())
    levels = space.draw_feasible(random.Random(0))
    assert levels is not None
    assert point_cost(topology, space.point(levels)).reduction > 0


def test_unsupported_uses_of_expert_roles_are_refused() -> None:
    topology = topology_of(tiny_model("mixtral"))
    for kind, methods in (("subset", ["tucker"]), ("depth_profile", ["fisher_svd"])):
        with pytest.raises(ConfigError, match=rf"`kind: levels`, but space 's' of kind '{kind}' names 'expert_down'"):
            space_of(topology, kind=kind, methods=methods, roles=["query", "expert_down"])
    with pytest.raises(ConfigError, match=r"methods that do not refit.*use 'fisher_svd'"):
        space_of(topology, methods=["fisher_svd_refit"], roles=["query", "expert_down"])
    # Roles that are kept dense are allowed.
    space_of(topology, kind="subset", roles=["query", "expert_down"], keep_roles=["expert_down"])
    space = space_of(topology, roles=["query", "expert_down"])
    foreign = DesignPoint.of({"layers.0.expert_down": TensorChoice("tucker", 1, 2)})
    with pytest.raises(PointError, match=r"truncates the expert mode of 'layers\.0\.expert_down'"):
        space.levels_of(foreign)


def experts_study(folder: Path, **changes: Any) -> dict[str, Any]:
    space = {
        "name": "experts",
        "methods": ["svd"],
        "roles": [*ATTENTION, *EXPERT_ROLES],
        "groups": {"layers": 1, "roles": {"attention": ATTENTION, "mlp": EXPERT_ROLES}},
        "ranks": {"kept_fractions": [0.6, 0.3]},
        "removal": True,
        "limits": {"reduction": {"min": 0.02, "max": 0.6}},
    }
    return tiny_study(folder, **{"space": space, **changes})


@pytest.fixture(scope="module", params=EXPERT_FAMILIES)
def experts_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder / "model", request.param, seed=0)
    save_choice_task(folder)
    return folder


def study_topology(folder: Path) -> Topology:
    return load_topology(str(folder / "model"))


def test_a_study_of_a_mixture_of_experts(experts_folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    # A user's point may truncate the expert mode, although the space has no level for it.
    own = {"method": "tucker", "rank": 6, "expert_rank": 2, "roles": EXPERT_ROLES, "layers": [0, 1]}
    removed = {"method": "removed", "rank": 0, "roles": ["mlp"], "layers": [1]}
    config = experts_study(experts_folder, budget={"trials": 7}, enqueue=[own, removed])
    study = run_study(config, out=tmp_path / "run", listener=watcher)
    records = evaluated(study)
    assert [record.state for record in records] == 7 * ["complete"]
    assert len({record.point_id for record in records}) == 7
    assert {choice.expert_rank for _, choice in records[1].point} == {2}
    assert records[2].point.to_json() == {"tensors": {"layers.1.mlp": {"method": "removed", "rank": 0}}}
    shape = study.attributes["facts"]["shape"]
    assert {rank_map_of(records[1].point, shape)[0][role] for role in EXPERT_ROLES} == {"6"}
    placed = placed_choices(records[1].point, shape)[0, "expert_down"]
    tensor = study_topology(experts_folder).experts_by_name["layers.0.expert_down"]
    assert placed.parameter_ratio == tensor.factor_parameters(6, 2) / tensor.parameters
    assert {rank_map_of(records[2].point, shape)[1][role] for role in EXPERT_ROLES} == {"removed"}
    tensors = [dict(record.point.by_name) for record in records]
    touched = {name.rpartition(".")[2]: choice.method for own in tensors for name, choice in own.items()}
    assert touched["expert_down"] == touched["expert_gate_up"] == "tucker"
    assert touched["query"] == "svd"
    assert all(math.isfinite(record.quantities["accuracy"].value or math.nan) for record in records)


def test_a_study_with_all_proposers(experts_folder: Path, tmp_path: Path) -> None:
    """Warm starts from a measured profile, refinement and allocations support expert groups."""
    config = experts_study(experts_folder, sampler={"name": "tpe"}, budget={"trials": 14})
    config["space"]["limits"] = {"reduction": {"min": 0.02, "max": 0.7}}
    watcher = Watcher()
    study = run_study({**config, "search": {"profile_tokens": 128}}, out=tmp_path / "run", listener=watcher)
    records = evaluated(study)
    assert not [message for message in watcher.messages if "no sensitivity profile" in message]
    assert "allocation" in {record.origin for record in records}
    assert [record.state for record in records] == len(records) * ["complete"]
    assert len(records) == 14


@pytest.mark.parametrize("kept", [EXPERT_ROLES, []])
def test_commands_on_a_mixture_of_experts(
    experts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_process: None, kept: list[str]
) -> None:
    model = str(experts_folder / "model")
    space = {**experts_study(experts_folder)["space"], "keep_roles": kept}
    path = tmp_path / "space.yaml"
    path.write_text(json.dumps(space))
    assert main(["space", str(path), "--model", model, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert set(described["roles"]) == {*ATTENTION, *EXPERT_ROLES} - set(kept)
    assert described["tensors"] == 12 + (0 if kept else 6)
    assert bool(kept) != ("expert_down" in described["ranks"])
    point = json.dumps({"method": "tucker", "rank": 4, "roles": EXPERT_ROLES})
    assert main(["cost", "--model", model, "--point", point, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reduction"] > 0.4
    assert main(["cost", "--model", model, "--point", point]) == 0
    assert "6 of 18 tensors" in capsys.readouterr().out
    wrong = json.dumps({"method": "svd", "rank": 4, "roles": EXPERT_ROLES})
    assert main(["cost", "--model", model, "--point", wrong]) == 2
    assert "must be decomposed by method 'tucker'" in " ".join(capsys.readouterr().err.split())
