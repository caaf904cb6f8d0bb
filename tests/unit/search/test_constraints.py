"""Constraints of spaces and studies: they hold for points of every origin, and contradictory ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_support import evaluated
from tiny_study import tiny_study, write_study
from topologies import topology_of_shapes

from dse.cli import main
from dse.config import parse_search_space, parse_study
from dse.errors import ConfigError
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.limits import measured_violations
from dse.study import run_study
from dse.topology import Topology

SPACE: dict[str, Any] = {"name": "s", "methods": ["svd"], "ranks": {"absolute": [1, 2]}}


def topology() -> Topology:
    return topology_of_shapes([{"query": (12, 12), "up": (12, 12)}] * 3, other=136, buffers_bytes=40)


def space_of(**config: Any) -> SearchSpace:
    return SearchSpace.from_config(parse_search_space({**SPACE, **config}), topology())


def test_a_limit_on_weight_bytes_limits_the_reduction() -> None:
    # 1000 parameters of 4 bytes and 40 bytes of buffers: 3640 bytes are a reduction of 10 %.
    space = space_of(limits={"weight_bytes": {"max": 3640}})
    assert space.limits[0] == pytest.approx(0.1)
    layers = dict.fromkeys(space.dimensions, 0)
    mild, strong = space.point({**layers, "layers.0": 1}), space.point(dict.fromkeys(space.dimensions, 2))
    assert space.violations(strong)["weight_bytes_max"] <= 0
    assert space.is_feasible(strong)
    # One layer at rank 2 removes 2 x (144 - 48) parameters: 192 of 1000.
    assert space.violations(mild)["weight_bytes_max"] == pytest.approx((4040 - 4 * 192 - 3640) / 3640)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"keep_layers": [3]}, "`0 <= layer < 3` must hold for Tiny, but `keep_layers`"),
        ({"keep_layers": [0, 1, 2]}, "keeps every layer in `layers` dense"),
        ({"layers": [1], "keep_layers": [1]}, "keeps every layer in `layers` dense"),
        ({"keep_roles": ["query", "up"]}, "keeps every role in `roles` dense"),
        ({"keep_roles": ["querry"]}, "did you mean 'query'?"),
        ({"limits": {"weight_bytes": {"max": 3000}, "reduction": {"max": 0.1}}}, "contradict each other"),
        ({"keep_layers": [0, 1], "limits": {"reduction": {"min": 0.5}}}, "(keep_layers [0, 1]) reaches reductions"),
    ],
)
def test_contradictory_constraints_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(**config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_constraints_of_a_study_are_combined_with_those_of_its_space(tiny_folder: Path) -> None:
    config = tiny_study(tiny_folder, constraints={"reduction": {"max": 0.3}, "keep_layers": [2], "keep_roles": ["key"]})
    config["space"]["keep_layers"] = [0]
    space = parse_study(config).constrained_space
    assert (space.limits.reduction.min, space.limits.reduction.max) == (0.02, 0.3)
    assert space.keep_layers == [0, 2]
    assert space.keep_roles == ["key"]
    resolved = parse_study(config).to_yaml()
    assert "constraints:" in resolved
    with pytest.raises(ConfigError, match="must hold for the constraints on reduction"):
        parse_study(tiny_study(tiny_folder, constraints={"reduction": {"min": 0.6}}))
    with pytest.raises(ConfigError, match="a limit on decode_latency_s needs decode_latency_s as an objective"):
        parse_study(tiny_study(tiny_folder, constraints={"decode_latency_s": {"max": 0.1}}))


def test_contradictory_constraints_end_a_run_with_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for constraints, words in (
        ({"reduction": {"min": 0.6}}, "must hold for the constraints on reduction"),
        ({"keep_layers": [0, 1, 2]}, "must leave room for a point"),
    ):
        study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder, constraints=constraints))
        assert main(["run", str(study), "--out", str(tmp_path / "run")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dse: error:")]
        assert len(lines) == 1
        assert words in lines[0]
    assert not (tmp_path / "run" / "study.db").exists()


def test_points_of_every_origin_satisfy_the_constraints(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(
        tiny_folder,
        sampler={"name": "tpe"},
        constraints={"keep_layers": [1], "keep_roles": ["query"], "reduction": {"max": 0.25}},
        budget={"trials": 16},
    )
    study = run_study(config, out=tmp_path / "run")
    assert {record.origin for record in evaluated(study)} >= {"allocation", "uniform"}
    for record in evaluated(study)[1:]:
        assert record.feasible
        assert 0.02 <= record.cost["reduction"] <= 0.25
        assert not any(name.startswith("layers.1.") or name.endswith(".query") for name in record.point.by_name)


def test_a_limit_on_a_measured_quantity_keeps_trials_off_the_front(tiny_folder: Path, tmp_path: Path) -> None:
    base = {"objectives": ["accuracy", "parameters", "decode_latency_s"], "budget": {"trials": 3}}
    study = run_study(
        tiny_study(tiny_folder, constraints={"decode_latency_s": {"max": 1e-9}}, **base), out=tmp_path / "a"
    )
    assert [record.state for record in evaluated(study)] == ["complete"] * 3
    assert not any(record.feasible for record in evaluated(study))
    assert study.front_records == []
    wide = run_study(
        tiny_study(tiny_folder, constraints={"decode_latency_s": {"max": 1e9}}, **base), out=tmp_path / "b"
    )
    assert all(record.feasible for record in evaluated(wide)[1:])
    assert wide.front_records


def test_constraint_values_of_measured_quantities_are_relative() -> None:
    limits = parse_search_space(
        {**SPACE, "limits": {"decode_latency_s": {"max": 0.02}, "peak_memory_bytes": {"min": 10}}}
    )
    found = measured_violations(limits.limits, {"decode_latency_s": 0.03, "accuracy": 1.0})
    assert found == pytest.approx({"decode_latency_s_max": 0.5})
    assert measured_violations(limits.limits, {"peak_memory_bytes": 8.0}) == pytest.approx(
        {"peak_memory_bytes_min": 0.2}
    )
