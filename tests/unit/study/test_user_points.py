"""The user's own points, inside or outside the levels of the space: evaluated first, checked, resumed, exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from study_support import Watcher, evaluated, interrupt, points_and_accuracies
from tiny_study import tiny_study, write_study

from dse.cli import main
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError
from dse.models import load_model
from dse.study import Study, open_study, run_study

OUTSIDE: dict[str, Any] = {
    "tensors": {
        "layers.0.query": {"method": "svd", "rank": 3},
        "layers.1.up": {"method": "tucker", "rank": 5},
        "layers.2.attention": {"method": "removed", "rank": 0},
    }
}
"""Ranks, a method and a removal that the space of `tiny_study` does not have; layer 2 loses its attention."""

INSIDE: dict[str, Any] = {"method": "svd", "rank": 6, "roles": ["up"]}


def own(study: Study) -> list[dict[str, Any]]:
    return [record.point.to_json() for record in study.records if record.origin == "enqueued"]


def test_a_point_outside_the_levels_is_evaluated_first_and_unchanged(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "outside.json").write_text(json.dumps(OUTSIDE))
    study_file = write_study(
        tmp_path / "study.yaml", tiny_study(tiny_folder, enqueue=["points/outside.json", INSIDE], budget={"trials": 4})
    )
    assert main(["run", str(study_file), "--out", str(tmp_path / "run")]) == 0
    study = open_study(tmp_path / "run")
    assert [record.origin for record in study.records[:3]] == ["dense", "enqueued", "enqueued"]
    outside, inside = study.records[1:3]
    assert outside.state == "complete"
    assert outside.point.to_json() == OUTSIDE
    assert "outside the levels of space 'tiny_space'" in outside.why
    assert inside.why == ""
    assert {choice.rank for _, choice in inside.point} == {6}
    # The resolved study holds the point itself, so that it resumes without the file.
    assert study.config.enqueue[0] == OUTSIDE
    capsys.readouterr()
    assert main(["front", str(tmp_path / "run"), "--explain", "1"]) == 0
    shown = capsys.readouterr().out
    assert "origin: enqueued (requested by the u" in shown
    assert "removed" in shown
    row = study.trials().set_index("trial").loc[1]
    assert (row["origin"], row["state"]) == ("enqueued", "complete")


def test_python_takes_design_points(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_folder / "model"), device="cpu")
    point = DesignPoint.of({"layers.1.value": TensorChoice("tucker_merged", 4)})
    config = tiny_study(tiny_folder, enqueue=[point], budget={"trials": 2}, space={**_space(), "limits": {}})
    study = run_study(config, out=tmp_path / "run")
    assert DesignPoint.from_json(own(study)[0], loaded.topology) == point


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_every_sampler_continues_after_it(tiny_folder: Path, tmp_path: Path, sampler: str) -> None:
    config = tiny_study(tiny_folder, enqueue=[OUTSIDE], sampler={"name": sampler}, budget={"trials": 5})
    study = run_study(config, out=tmp_path / "run")
    assert study.evaluated_trials == 5
    assert own(study) == [OUTSIDE]


@pytest.mark.parametrize("kind", ["subset", "depth_profile"])
def test_every_kind_of_space_accepts_it(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    space = {"name": kind, "kind": kind, "methods": ["svd"], "ranks": {"absolute": [2, 6]}}
    config = tiny_study(tiny_folder, enqueue=[OUTSIDE], space=space, sampler={"name": "tpe"}, budget={"trials": 14})
    study = run_study(config, out=tmp_path / "run")
    assert own(study) == [OUTSIDE]
    assert study.records[1].state == "complete"
    assert study.evaluated_trials == 14


def test_a_stopped_study_resumes_with_the_same_point(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, enqueue=[OUTSIDE, INSIDE], sampler={"name": "tpe"}, budget={"trials": 8})
    whole = run_study(config, out=tmp_path / "whole")
    for watcher in (Watcher(during={1: interrupt}), Watcher(before={1: interrupt}), Watcher(during={4: interrupt})):
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "stopped", listener=watcher)
    resumed = run_study(config, out=tmp_path / "stopped")
    assert points_and_accuracies(resumed) == points_and_accuracies(whole)
    first = next(record for record in evaluated(resumed) if record.trial > 0)
    assert (first.trial, first.origin, first.point.to_json()) == (1, "enqueued", OUTSIDE)
    assert first.why == whole.records[1].why


def test_a_point_can_be_added_to_a_started_study(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 3}, enqueue=[INSIDE])
    first = run_study(config, out=tmp_path / "run")
    longer = {**config, "enqueue": [OUTSIDE, INSIDE], "budget": {"trials": 5}}
    with pytest.raises(KeyboardInterrupt):
        run_study(longer, out=tmp_path / "run", listener=Watcher(before={3: interrupt}))
    second = run_study(longer, out=tmp_path / "run")
    assert second.records[: len(first.records)] == first.records
    assert evaluated(second)[3].point.to_json() == OUTSIDE
    assert sum(record.point_id == evaluated(second)[3].point_id for record in evaluated(second)) == 1
    assert second.evaluated_trials == 5
    with pytest.raises(Exception, match=re.escape("holds another study (different: enqueue)")):
        run_study({**config, "enqueue": []}, out=tmp_path / "run")


def test_an_own_point_is_exported(tiny_folder: Path, tmp_path: Path) -> None:
    from dse.standalone import export_trials

    study = run_study(tiny_study(tiny_folder, enqueue=[OUTSIDE], budget={"trials": 2}), out=tmp_path / "run")
    result = export_trials(study, 1, out=tmp_path / "model")[0]
    assert result.parameters == study.records[1].cost["parameters"]


def _space(**changes: Any) -> dict[str, Any]:
    space: dict[str, Any] = tiny_study(Path())["space"]
    return {**space, **changes}


@pytest.mark.parametrize(
    ("point", "changes", "words"),
    [
        ({"tensors": {"layers.0.query": {"method": "svd", "rank": 17}}}, {}, "`rank <= 16` must hold"),
        ({"tensors": {"layers.0.gate": {"method": "svd", "rank": 3}}}, {}, "does not contain layers.0.gate"),
        ({"tensors": {"layers.0.mlp": {"method": "removed", "rank": 0}}}, {}, "changes 'layers.0.mlp', and"),
        (OUTSIDE, {"constraints": {"keep_layers": [1]}}, "`keep_layers` [1] keeps layer 1 dense"),
        (OUTSIDE, {"constraints": {"keep_roles": ["value"]}}, "`keep_roles` ['value'] keeps value dense"),
        (OUTSIDE, {"constraints": {"reduction": {"min": 0.3}}}, "violates reduction_min by 0."),
        ("none.json", {}, "none.json: No such file"),
        ({"tensors": {f"layers.{i}.attention": {"method": "removed", "rank": 0} for i in range(3)}}, {}, "must remain"),
    ],
)
def test_points_that_break_a_constraint_are_refused_in_one_line(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    point: Any,
    changes: dict[str, Any],
    words: str,
) -> None:
    study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder, enqueue=[point], **changes))
    assert main(["run", str(study), "--out", str(tmp_path / "run")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1
    assert "enqueue" in error[0]
    assert words in error[0]
    assert not (tmp_path / "run").exists()


def test_the_dense_point_can_be_enqueued(tiny_folder: Path, tmp_path: Path) -> None:
    study = run_study(tiny_study(tiny_folder, enqueue=[{}], budget={"trials": 2}), out=tmp_path / "run")
    assert own(study) == []
    with pytest.raises(ConfigError, match="`tensors` must map tensor names to choices"):
        run_study(tiny_study(tiny_folder, enqueue=[{"tensors": 3}]), out=tmp_path / "other")
