"""Whole studies of a tiny model: samplers, repetitions, infeasible points, failures, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from study_support import MILD_POINT, MILD_SPACE, SMALL_SPACE, Watcher, evaluated
from tiny_models import save_tiny_model
from tiny_study import save_choice_task, tiny_study

from dse.config import parse_study
from dse.errors import ConfigError, MeterUnavailableError, StudyError, TaskError, UserError
from dse.measurement import find_meters
from dse.pareto import objectives_named
from dse.study import SAMPLERS, open_study, run_study
from dse.trial.objectives import resolve_objectives


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_whole_study_with_each_sampler(tiny_folder: Path, tmp_path: Path, sampler: str) -> None:
    watcher = Watcher()
    config = tiny_study(tiny_folder, sampler={"name": sampler}, budget={"trials": 9})
    study = run_study(config, out=tmp_path / "run", listener=watcher)
    records = evaluated(study)
    assert len(records) == 9
    assert all(record.state == "complete" for record in records)
    assert watcher.started == [record.trial for record in records] == [trial for trial, _ in watcher.ended]
    # The dense model comes first; it lies outside the limits, but it is the reference.
    assert records[0].trial == 0
    assert records[0].is_dense
    assert records[0].origin == "dense"
    assert records[0].accuracy_drop is not None
    assert records[0].accuracy_drop.value == 0.0
    # No point is evaluated twice, and all keep the limits.
    assert len({record.point_id for record in records}) == 9
    assert all(0.02 <= record.cost["reduction"] <= 0.5 for record in records[1:])
    origins = {record.origin for record in study.records}
    assert origins >= ({"sampler"} if sampler in ("random", "qmc") else {"ladder", "spread", "sampler"})
    table = study.trials()
    assert table["on_front"].sum() == study.front_size >= 1
    assert study.hypervolume is not None
    assert 0 < study.hypervolume < 1
    progress = [entry for _, entry in watcher.ended]
    assert [entry.finished for entry in progress] == list(range(1, 10))
    volumes = [entry.hypervolume for entry in progress if entry.hypervolume is not None]
    assert len(volumes) == 9
    assert volumes == sorted(volumes)
    assert progress[-1].seconds_left == 0
    assert {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")} == {
        "study.yaml", "study.db", "trials.csv", "front.csv", "front.html", "front.png", "run.log", "outcomes",
        "workers.json",
    }  # fmt: skip


def test_paths_and_configs_are_taken_as_well(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_study(tiny_folder, budget={"trials": 2})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config))
    first = run_study("study.yaml")
    assert first.folder.path == Path("runs/tiny")
    second = run_study(parse_study(config), out="other")
    assert [r.point_id for r in first.records] == [r.point_id for r in second.records]


def test_a_small_space_is_exhausted_and_nothing_is_evaluated_twice(tiny_folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    config = tiny_study(tiny_folder, space=SMALL_SPACE, budget={"trials": 30})
    study = run_study(config, out=tmp_path / "run", listener=watcher)
    assert study.evaluated_trials == 9
    assert study.is_exhausted
    assert "the space is exhausted" in watcher.messages[-1]
    by_number = {record.trial: record for record in study.records}
    repeated = [record for record in study.records if record.state == "duplicate"]
    assert repeated
    for record in repeated:
        assert record.duplicate_of is not None
        first = by_number[record.duplicate_of]
        assert first.state == "complete"
        assert record.point_id == first.point_id
        assert record.quantities == first.quantities
        assert record.reason == f"same point as trial {first.trial}"
        assert record.trial not in watcher.started
    table = study.trials()
    assert list(table.loc[table["state"] == "duplicate", "duplicate_of"]) == [r.duplicate_of for r in repeated]
    assert not table.loc[table["state"] == "duplicate", "on_front"].any()
    again = Watcher()
    assert run_study(config, out=tmp_path / "run", listener=again).evaluated_trials == 9
    assert again.messages == ["complete: 9 trials are done, and the space is exhausted"]


def test_infeasible_points_cost_no_evaluation(tiny_folder: Path, tmp_path: Path) -> None:
    narrow = {"reduction": {"min": 0.30, "max": 0.34}}
    config = tiny_study(tiny_folder, budget={"trials": 6})
    config["space"]["limits"] = narrow
    watcher = Watcher()
    study = run_study(config, out=tmp_path / "run", listener=watcher)
    infeasible = [record for record in study.records if record.state == "infeasible"]
    assert len(infeasible) >= 3
    for record in infeasible:
        assert record.trial not in watcher.started
        assert record.quantities == {}
        assert record.seconds == {}
        assert not record.feasible
        assert "exceeded by" in record.reason
        assert not 0.30 <= record.cost["reduction"] <= 0.34
    assert any(record.origin == "repaired" for record in evaluated(study))
    assert all(0.30 <= record.cost["reduction"] <= 0.34 for record in evaluated(study)[1:])
    table = study.trials()
    assert table.loc[table["state"] == "infeasible", "accuracy"].isna().all()
    # The dense model is outside the limits as well: reference, but not on the front.
    assert not table.loc[0, "feasible"]
    assert not table.loc[0, "on_front"]
    assert bool(study.front().iloc[0]["is_dense"])


def bank_file(cache: Path, tensor: str) -> Path:
    """The factors of `tensor` in the one bank of this cache."""
    (path,) = (cache / "factor_banks").glob(f"svd-*/{tensor}.safetensors")
    return path


def fill_with_nan(path: Path) -> None:
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("divergence", "reason"),
    [
        (fill_with_nan, "NonFiniteError: "),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "SafetensorError: "),
        (Path.unlink, "FileNotFoundError: "),
    ],
    ids=["nan", "truncated", "missing"],
)
def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    divergence: Callable[[Path], Any],
    reason: str,
) -> None:
    """The factors of one tensor are damaged after they were checked: only what decomposes it fails."""
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    watcher = Watcher(before={0: lambda: divergence(bank_file(tmp_path / "cache", "layers.0.up"))})
    config = tiny_study(tiny_folder, space=SMALL_SPACE, budget={"trials": 30})
    study = run_study(config, out=tmp_path / "run", listener=watcher)
    failed = [record for record in study.records if record.state == "failed"]
    # 6 of the 9 points decompose that tensor.
    assert len(failed) == 6
    assert all("layers.0.up" in record.point.by_name for record in failed)
    assert all(record.reason.startswith(reason) for record in failed)
    assert all("\n" not in record.reason for record in failed)
    assert [record.state for record in evaluated(study) if "layers.0.up" not in record.point.by_name] == [
        "complete"
    ] * 3
    # Failed points are not tried again either, and their repetition has no values.
    again = [
        record
        for record in study.records
        if record.state == "duplicate" and record.duplicate_of in {r.trial for r in failed}
    ]
    assert again
    assert all("which failed: " in record.reason for record in again)
    with pytest.raises(StudyError, match="must be complete, but is failed"):
        study.record(again[0].trial)
    table = pd.read_csv(study.folder.trials_csv)
    assert set(table.loc[table["state"] == "failed", "reason"]) == {record.reason for record in failed}
    assert not table.loc[table["state"] == "failed", "on_front"].any()
    # Nothing of a failed trial stays in the model: the points after it measure what they do in a sound study.
    sound = run_study(config | {"name": "sound"}, out=tmp_path / "sound")
    expected = {record.point_id: record.quantities for record in evaluated(sound)}
    for record in evaluated(study):
        assert record.state == "failed" or record.quantities == expected[record.point_id]


def test_a_dense_model_that_cannot_be_measured_ends_the_study(tmp_path: Path) -> None:
    save_choice_task(tmp_path)
    weights = save_tiny_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], math.nan)
    save_file(tensors, weights, {"format": "pt"})
    config = tiny_study(tmp_path)
    for _ in range(2):  # the same trial again: the model can be repaired in between
        with pytest.raises(StudyError, match=r"the dense model \(trial 0\) must be measurable, but: NonFinite"):
            run_study(config, out=tmp_path / "run")
    study = open_study(tmp_path / "run")
    assert study.records == []
    assert study.hypervolume is None
    assert (tmp_path / "run" / "trials.csv").is_file()
    # Nothing was measured, so the model and the study can be repaired and run again.
    save_tiny_model(tmp_path / "model")
    assert run_study(config, out=tmp_path / "run", trials=2).records[0].state == "complete"


def test_graded_metrics_are_objectives_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    names = ["choice_probability", "target_log_likelihood", "parameters"]
    study = run_study(tiny_study(tiny_folder, objectives=names), out=tmp_path / "run", trials=4)
    table = study.trials()
    assert table["on_front"].any()
    assert study.hypervolume is not None
    dense = study.folder.read_evaluation(0)
    for record in evaluated(study):
        stored = study.folder.read_evaluation(record.trial)
        row = table.loc[table["trial"] == record.trial].iloc[0]
        for name in names[:2]:
            outcomes = stored.tasks[0].graded[name]
            assert row[name] == pytest.approx(outcomes.mean())
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
            drop = float((dense.tasks[0].graded[name] - outcomes).mean())
            assert row[f"{name}_drop"] == pytest.approx(drop, abs=1e-12)
            assert row[f"task.tiny_choice.{name}"] == pytest.approx(outcomes.mean())
        if record.trial:
            assert row["accuracy_drop_documents"] == row["choice_probability_drop_documents"] == 24
            assert 0 <= row["target_log_likelihood_drop_p_value"] <= 1
            assert row["choice_probability_drop_detectable"] > 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"objectives": ["acuracy"]}, ConfigError, "did you mean 'accuracy'?"),
        ({"tasks": ["no_such_task_here"]}, TaskError, "no_such_task_here"),
        ({"tasks": ["none.yaml"]}, TaskError, "none.yaml"),
        ({"model": {"ref": "./no/such/model"}}, UserError, "no/such/model"),
        ({"model": {"ref": "MODEL", "device": "abacus"}}, ConfigError, "`model.device` must be auto"),
        ({"model": {"ref": "MODEL", "device": "cuda:77"}}, UserError, "cuda:77"),
        ({"enqueue": [{"method": "svd", "rank": 3}]}, ConfigError, "does not contain layers.0.down"),
        ({"enqueue": [{"method": "svd", "rank": 0}]}, ConfigError, "`rank >= 1` must hold"),
        ({"enqueue": [{"method": "svd", "rank": 6, "layers": [9]}]}, ConfigError, "layer=9"),
        ({"space": MILD_SPACE, "enqueue": [MILD_POINT]}, ConfigError, "must satisfy the space's limits"),
        ({"measurement": {"prompt_tokens": 63}, "objectives": ["prefill_latency_s"]}, ConfigError, "prompt_tokens"),
        ({"objectives": ["accuracy", "perplexity"]}, ConfigError, "objective 'perplexity' needs a task whose metric"),
        ({"tasks": [{"task": "TASK", "metric": "f1"}]}, TaskError, "f1"),
        ({"tasks": [], "objectives": ["choice_probability"]}, ConfigError, "for the objective choice_probability"),
        (
            {"tasks": ["dse_text"], "objectives": ["choice_probability"]},
            ConfigError,
            "objective 'choice_probability' needs a multiple-choice task with a known right answer, but none of",
        ),
        (
            {"tasks": ["dse_text"], "objectives": ["target_log_likelihood"]},
            ConfigError,
            "objective 'target_log_likelihood' needs a multiple-choice or cloze task",
        ),
        (
            {"space": {**SMALL_SPACE, "methods": ["whitened_svd"]}, "calibration": {"sources": [{"file": "none.txt"}]}},
            UserError,
            "none.txt",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_before_the_first_trial(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any], error: type[UserError], words: str
) -> None:
    config = tiny_study(tiny_folder, **change)
    text = yaml.safe_dump(config).replace("MODEL", str(tiny_folder / "model"))
    config = yaml.safe_load(text.replace("TASK", str(tiny_folder / "tiny_choice.yaml")))
    with pytest.raises(error) as caught:
        run_study(config, out=tmp_path / "run")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


needs_no_meter = pytest.mark.skipif(
    any(status.available for status in find_meters(torch.device("cpu"))), reason="this machine has an energy meter"
)


@needs_no_meter
def test_energy_without_a_meter_is_refused_before_the_first_trial(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, objectives=["accuracy", "energy_per_token_j"], model="./does/not/matter")
    with pytest.raises(MeterUnavailableError, match=r"'energy_per_token_j' needs an energy meter.*`optional: true`"):
        run_study(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="all of them were left out"):
        run_study(config | {"objectives": [{"name": "prefill_energy_j", "optional": True}]}, out=tmp_path / "run")


@needs_no_meter
def test_optional_energy_is_left_out_with_a_notice(tiny_folder: Path, tmp_path: Path) -> None:
    objectives = ["accuracy", {"name": "energy_per_token_j", "optional": True}, "parameters"]
    watcher = Watcher()
    study = run_study(
        tiny_study(tiny_folder, objectives=objectives, budget={"trials": 2}), out=tmp_path / "run", listener=watcher
    )
    assert watcher.messages[0].startswith("objective energy_per_token_j is left out: ")
    assert [objective.name for objective in study.objectives] == ["accuracy", "parameters"]


def test_a_study_keeps_the_objectives_it_was_begun_with(tiny_folder: Path) -> None:
    objectives = ["accuracy", {"name": "energy_per_token_j", "optional": True}]
    config = parse_study(tiny_study(tiny_folder, objectives=objectives))
    with_meter, dropped = resolve_objectives(config, None)
    assert (with_meter, dropped) == (objectives_named(["accuracy", "energy_per_token_j"]), {})
    kept, dropped = resolve_objectives(config, None, started_with=["accuracy"])
    assert kept == objectives_named(["accuracy"])
    assert dropped == {"energy_per_token_j": "this study started without it"}
    with pytest.raises(MeterUnavailableError, match="started with objective 'energy_per_token_j'"):
        resolve_objectives(config, "there is none", started_with=["accuracy", "energy_per_token_j"])
