"""Whole studies of a tiny model: samplers, repetitions, failures, and everything that may stop one and go on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_study import merged, save_choice_task, save_tiny_model, tiny_study

from dse.config import parse_study
from dse.design_point import DesignPoint
from dse.errors import ConfigError, MeterUnavailableError, StorageFullError, StudyError, TaskError, UserError
from dse.measurement import find_meters
from dse.pareto import objectives_named, reference_point
from dse.study import SAMPLERS, Study, StudyListener, StudyProgress, TrialRecord, open_study, run_study
from dse.study.evaluate_point import blank_record
from dse.study.objectives import resolve_objectives
from dse.study.record import to_row
from dse.study.setup import PreparedStudy, prepare_study


@dataclass
class Watcher(StudyListener):
    """Notes what happens, and does `before[trial]` when that trial starts."""

    messages: list[str] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    ended: list[tuple[int, StudyProgress]] = field(default_factory=list)
    before: dict[int, Callable[[], None]] = field(default_factory=dict)
    on_evaluate: dict[int, Callable[[], None]] = field(default_factory=dict)

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if phase == "evaluate" and self.started and self.started[-1] in self.on_evaluate:
            self.on_evaluate.pop(self.started[-1])()

    def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
        self.started.append(record.trial)
        if record.trial in self.before:
            self.before[record.trial]()

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        self.ended.append((record.trial, progress))


def stop() -> None:
    raise KeyboardInterrupt


def evaluated(study: Study) -> list[TrialRecord]:
    return [record for record in study.records if record.state in ("complete", "failed")]


SMALL_SPACE = {
    "name": "small",
    "methods": ["svd"],
    "layers": [0],
    "groups": {"roles": {"attention": ["query", "key"], "mlp": ["up"]}},
    "ranks": {"absolute": [2, 6]},
}  # 3 x 3 points, the dense one among them


# --- samplers ---------------------------------------------------------------------------------------------------------


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
    assert records[0].point == {"tensors": {}}
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


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(finished_study: Path) -> Study:
    return open_study(finished_study)


def test_trials_csv_has_the_columns_of_its_documentation(measured: Study) -> None:
    table = pd.read_csv(measured.folder.trials_csv)
    assert list(table["trial"]) == [record.trial for record in measured.records]
    assert set(table["state"]) <= {"complete", "failed", "duplicate", "infeasible", "interrupted"}
    names = (
        "trial state reason origin duplicate_of feasible on_front point_id point decomposed_tensors reduction"
        " parameters_dense parameters weight_bytes flops_prefill_per_token flops_decode_per_token"
        " accuracy accuracy_low accuracy_high accuracy_drop accuracy_drop_low accuracy_drop_high"
        " decode_latency_s decode_latency_s_low decode_latency_s_high decode_latency_s_ratio"
        " decode_latency_s_ratio_low decode_latency_s_ratio_high prefill_latency_s"
        " task.tiny_choice.acc task.tiny_choice.acc_stderr task.tiny_choice.documents"
        " seconds_decompose_s seconds_evaluate_s seconds_latency_s seconds_undo_s seconds_total_s"
        " latency_is_valid latency_reason started_at"
    )
    assert set(names.split()) <= set(table.columns)
    assert all(pd.api.types.is_bool_dtype(table[column]) for column in ("feasible", "on_front"))
    complete = table[table["state"] == "complete"]
    for column in ("accuracy", "decode_latency_s", "parameters", "reduction"):
        assert complete[column].notna().all()
        assert pd.api.types.is_numeric_dtype(table[column])
    assert (complete["task.tiny_choice.documents"] == 24).all()
    assert (complete["decode_latency_s"] > 0).all()
    # The dense row is trial 0, and every drop and ratio refers to it.
    dense = table.iloc[0]
    assert dense["decomposed_tensors"] == 0
    assert dense["decode_latency_s_ratio"] == 1
    assert np.allclose(complete["accuracy_drop"], dense["accuracy"] - complete["accuracy"])
    assert np.allclose(complete["decode_latency_s"], complete["decode_latency_s_ratio"] * dense["decode_latency_s"])
    assert np.allclose(complete["reduction"], 1 - complete["parameters"] / dense["parameters"])
    assert (complete["accuracy_drop_low"] <= complete["accuracy_drop"] + 1e-12).all()
    assert (complete["accuracy_drop"] <= complete["accuracy_drop_high"] + 1e-12).all()
    pd.testing.assert_frame_equal(table[["trial", "accuracy"]], measured.trials()[["trial", "accuracy"]])


def test_points_in_the_table_are_points(measured: Study, tiny_folder: Path) -> None:
    from dse.models import load_topology

    topology = load_topology(str(tiny_folder / "model"))
    for _, row in measured.trials().iterrows():
        assert DesignPoint.from_json(row["point"], topology).id == row["point_id"]


def test_a_record_is_full(measured: Study) -> None:
    record = next(record for record in measured.records if record.state == "complete" and record.point["tensors"])
    assert record.latency is not None
    assert record.latency["decode"]["subject"]["count"] == 4
    assert record.latency["decode"]["dense"]["p10_s"] <= record.latency["decode"]["dense"]["p90_s"]
    assert record.latency["device"] == "cpu"
    assert record.latency["clock"]
    assert record.tasks["tiny_choice"]["documents"] == 24
    assert set(record.seconds) == {"decompose", "evaluate", "latency", "undo", "total"}
    assert record.seconds["total"] == pytest.approx(sum(v for k, v in record.seconds.items() if k != "total"))
    assert TrialRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record
    outcomes = np.load(measured.folder.outcomes(record.trial))
    assert outcomes["outcomes_0"].shape == (24,)
    assert outcomes["outcomes_0"].mean() == pytest.approx(record.quantities["accuracy"].value)


def test_facts_of_the_study(measured: Study) -> None:
    facts = measured.attributes["facts"]
    assert len(facts["model_fingerprint"]) == 16
    assert facts["environment"]["packages"]["torch"]
    assert facts["environment"]["cpu"]["model"]
    assert facts["seeds"] == {"sampler": 1, "documents": 0, "calibration": 0}
    assert measured.attributes["objectives"] == ["accuracy", "decode_latency_s", "parameters"]
    assert "Model fingerprint" in measured.facts()


def test_the_reference_of_the_hypervolume_is_fixed_by_the_dense_model(measured: Study) -> None:
    dense = measured.records[0]
    values = {"accuracy": dense.quantities["accuracy"].value, "parameters": dense.cost["parameters"]}
    values["decode_latency_s"] = dense.quantities["decode_latency_s"].value
    assert measured.attributes["reference"] == reference_point(measured.objectives, values)


def test_plot_front_and_recommend(measured: Study) -> None:
    figure = measured.plot_front()
    assert type(figure).__name__ == "Figure"
    advice = measured.recommend(1.0)
    assert advice.trial in set(measured.trials()["trial"])
    nothing = measured.recommend(0.0, min_reduction=0.99)
    assert nothing.trial is None
    assert nothing.nearest_miss_trial is not None


def test_only_complete_trials_have_records_to_export(measured: Study) -> None:
    with pytest.raises(StudyError, match="a trial must be one of this study's"):
        measured.record(999)
    assert measured.record(0).state == "complete"


# --- repeated, infeasible and failed points ---------------------------------------------------------------------------


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
    assert again.messages == ["complete: 9 trials are there, and the space holds no further point"]


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
    ("damage", "reason"),
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
    damage: Callable[[Path], Any],
    reason: str,
) -> None:
    """The factors of one tensor are damaged after they were checked: only what decomposes it fails."""
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    watcher = Watcher(before={0: lambda: damage(bank_file(tmp_path / "cache", "layers.0.up"))})
    config = tiny_study(tiny_folder, space=SMALL_SPACE, budget={"trials": 30})
    study = run_study(config, out=tmp_path / "run", listener=watcher)
    failed = [record for record in study.records if record.state == "failed"]
    # 6 of the 9 points decompose that tensor.
    assert len(failed) == 6
    assert all("layers.0.up" in record.point["tensors"] for record in failed)
    assert all(record.reason.startswith(reason) for record in failed)
    assert all("\n" not in record.reason for record in failed)
    assert [record.state for record in evaluated(study) if "layers.0.up" not in record.point["tensors"]] == [
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
    for trial in range(2):  # again and again: the model may be mended in between
        with pytest.raises(StudyError, match=rf"the dense model \(trial {trial}\) must be measurable, but: NonFinite"):
            run_study(config, out=tmp_path / "run")
    study = open_study(tmp_path / "run")
    assert [record.state for record in study.records] == ["interrupted"] * 2
    assert study.hypervolume is None
    assert (tmp_path / "run" / "trials.csv").is_file()


# --- one point --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tiny_folder: Path) -> PreparedStudy:
    config = tiny_study(tiny_folder, objectives=["accuracy", "decode_latency_s"])
    return prepare_study(parse_study(config), StudyListener())


def weights_of(prepared: PreparedStudy) -> dict[str, tuple[int, bytes]]:
    model = prepared.loaded.model
    return {name: (id(tensor), tensor.numpy().tobytes()) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("phase", ["decompose", "evaluate", "latency"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, StudyError, RuntimeError, MemoryError, ValueError])
def test_the_model_is_dense_again_whatever_happens(
    prepared: PreparedStudy, phase: str, error: type[BaseException]
) -> None:
    before = weights_of(prepared)
    topology = prepared.loaded.topology
    point = DesignPoint.uniform(topology, "svd", 2, [1, 2], ["up", "query"])
    count = 0

    def on_phase(name: str, done: int, total: int) -> None:
        nonlocal count
        count += name == phase
        if count == (1 if phase == "decompose" else 2):
            raise error("stop")

    prepared.evaluator.on_phase = on_phase
    blank = blank_record(1, point, topology, "sampler")
    if error in (KeyboardInterrupt, StudyError):
        with pytest.raises(error):
            prepared.evaluator.evaluate(blank, point, None)
    else:
        record, _ = prepared.evaluator.evaluate(blank, point, None)
        assert record.state == "failed"
        assert ("OutOfMemoryError: " if error is MemoryError else f"{error.__name__}: stop") in record.reason
    assert weights_of(prepared) == before


def test_a_row_of_the_table_holds_nothing_that_is_not_known(prepared: PreparedStudy) -> None:
    row = to_row(blank_record(3, DesignPoint.dense(), prepared.loaded.topology, "dense"))
    assert row["trial"] == 3
    assert "accuracy" not in row
    assert row["reduction"] == 0


# --- stopping and going on --------------------------------------------------------------------------------------------


def outcome(study: Study) -> list[tuple[str, float | None]]:
    """Points and accuracies, in the order of their ids: a point that is tried again comes later."""
    return sorted((r.point_id, r.quantities["accuracy"].value) for r in evaluated(study))


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_resumed_study_proposes_what_an_uninterrupted_one_would(
    tiny_folder: Path, tmp_path: Path, sampler: str
) -> None:
    config = tiny_study(tiny_folder, sampler={"name": sampler}, budget={"trials": 12})
    whole = run_study(config, out=tmp_path / "whole")
    # Stopped in trial 2 as by a kill (nothing is written), in trial 6 and 9 as by Ctrl-C during the evaluation.
    for watcher in (
        Watcher(before={2: stop}),
        Watcher(on_evaluate={6: stop}),
        Watcher(on_evaluate={9: stop}),
    ):
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "stopped", listener=watcher)
    resumed = run_study(config, out=tmp_path / "stopped")
    interrupted = [record for record in resumed.records if record.state == "interrupted"]
    assert [record.trial for record in interrupted] == [2, 6, 9]
    assert [record.reason for record in interrupted] == [
        "the process was stopped during this trial", "stopped by the user", "stopped by the user",
    ]  # fmt: skip
    retried = [record.point_id for record in resumed.records if record.origin == "retried"]
    assert retried == [record.point_id for record in interrupted]
    assert outcome(resumed) == outcome(whole)
    assert resumed.evaluated_trials == 12
    assert resumed.attributes["reference"] == whole.attributes["reference"]
    assert resumed.hypervolume == pytest.approx(whole.hypervolume)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_dense_model_comes_first_even_if_it_was_interrupted(tiny_folder: Path, tmp_path: Path, how: str) -> None:
    config = tiny_study(tiny_folder, enqueue=[{"method": "svd", "rank": 6, "roles": ["up"]}])
    watcher = Watcher(before={0: stop}) if how == "killed" else Watcher(on_evaluate={0: stop})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "run", listener=watcher)
        watcher = Watcher(on_evaluate={1: stop})
    study = run_study(config, out=tmp_path / "run")
    assert [record.state for record in study.records[:3]] == ["interrupted", "interrupted", "complete"]
    assert [record.origin for record in study.records[:4]] == ["dense", "dense", "dense", "enqueued"]
    assert study.attributes["reference"]["parameters"] == 1.1 * study.records[2].cost["parameters_dense"]
    first = study.records[3]
    assert first.accuracy_drop is not None
    assert first.accuracy_drop.low is not None
    assert study.evaluated_trials == 5


def test_more_trials_go_on_and_running_again_says_complete(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    save_choice_task(tmp_path)
    config = tiny_study(tmp_path, budget={"trials": 3})
    first = run_study(config, out=tmp_path / "run")
    watcher = Watcher()
    second = run_study(config, out=tmp_path / "run", trials=6, listener=watcher)
    assert watcher.messages[-1] == "going on with 3 of 6 trials done"
    assert watcher.started == [record.trial for record in evaluated(second)[3:]]
    assert second.records[: len(first.records)] == first.records
    assert second.evaluated_trials == 6
    assert second.config.budget.trials == 6
    assert second.attributes["reference"] == first.attributes["reference"]
    assert second.attributes["facts"] == first.attributes["facts"]
    shutil.rmtree(tmp_path / "model")  # saying so needs no model
    (second.folder.front_html).unlink()
    watcher = Watcher()
    third = run_study(config, out=tmp_path / "run", trials=6, listener=watcher)
    assert watcher.messages == ["complete: all 6 trials are there"]
    assert third.records == second.records
    assert third.folder.front_html.is_file()


def test_a_study_that_was_killed_before_it_began(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 2})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".study.yaml.abc.tmp").write_text("na")
    for made in ("nothing", "study.yaml", "study.db"):
        if made == "study.yaml":
            (folder / "study.yaml").write_text(parse_study(config).to_yaml())
        if made == "study.db":
            (folder / "study.db").touch()
        with pytest.raises(StudyError, match=r"study\.yaml|study\.db|never started"):
            open_study(folder)
    assert run_study(config, out=folder).evaluated_trials == 2


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"sampler": {"seed": 2}}, "sampler"),
        ({"space": SMALL_SPACE}, "space"),
        ({"objectives": ["accuracy", "weight_bytes"]}, "objectives"),
        ({"evaluation": {"limit": 5}, "name": "other"}, "name, evaluation"),
    ],
)
def test_another_study_in_the_folder_is_refused(
    tiny_folder: Path, finished_study: Path, change: dict[str, Any], different: str
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished_study.iterdir())
    config = merged(yaml.safe_load((finished_study / "study.yaml").read_text()), change)
    with pytest.raises(StudyError, match=rf"holds another study \(different: {different}\)"):
        run_study(config, out=finished_study)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished_study.iterdir()) == before


def test_a_folder_that_is_no_study_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(StudyError, match="exists and is no study"):
            run_study(config, out=tmp_path / name)
    with pytest.raises(StudyError, match="File name too long"):
        run_study(config, out=tmp_path / ("x" * 300))
    with pytest.raises(StorageFullError, match="choose another folder"):
        run_study(config, out=tmp_path / "file" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_what_must_stay_the_same_is_checked_when_a_study_goes_on(tmp_path: Path) -> None:
    save_choice_task(tmp_path)
    save_tiny_model(tmp_path / "model")
    config = tiny_study(tmp_path, budget={"trials": 2})
    run_study(config, out=tmp_path / "run")
    save_tiny_model(tmp_path / "model", seed=6)
    with pytest.raises(StudyError, match="was begun with another model"):
        run_study(config, out=tmp_path / "run", trials=3)
    save_tiny_model(tmp_path / "model")
    data = tmp_path / "tiny_choice.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["gold"] = (rows[3]["gold"] + 1) % 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StudyError, match="was begun with another tasks, documents or lm-eval version"):
        run_study(config, out=tmp_path / "run", trials=3)
    save_choice_task(tmp_path)
    assert run_study(config, out=tmp_path / "run", trials=3).evaluated_trials == 3
    # The dense model's outcomes are the reference of every paired drop; without them there is no going on.
    open_study(tmp_path / "run").folder.outcomes(0).write_bytes(b"damaged")
    with pytest.raises(StudyError, match="damaged"):
        run_study(config, out=tmp_path / "run", trials=4)
    assert open_study(tmp_path / "run").evaluated_trials == 3


# --- what is refused before the first trial ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"objectives": ["acuracy"]}, ConfigError, "did you mean 'accuracy'?"),
        ({"tasks": ["no_such_task_here"]}, TaskError, "no_such_task_here"),
        ({"tasks": ["none.yaml"]}, TaskError, "none.yaml"),
        ({"model": {"ref": "./no/such/model"}}, UserError, "no/such/model"),
        ({"model": {"ref": "MODEL", "device": "abacus"}}, ConfigError, "`model.device` must be auto"),
        ({"model": {"ref": "MODEL", "device": "cuda:77"}}, UserError, "cuda:77"),
        ({"enqueue": [{"method": "svd", "rank": 3}]}, ConfigError, "`enqueue.0`: point "),
        ({"enqueue": [{"method": "svd", "rank": 0}]}, ConfigError, "`rank >= 1` must hold"),
        ({"enqueue": [{"method": "svd", "rank": 6, "layers": [9]}]}, ConfigError, "layer=9"),
        ({"enqueue": [{"method": "svd", "rank": 6}, {"method": "svd", "rank": 2}]}, ConfigError, "the space's limits"),
        ({"measurement": {"prompt_tokens": 63}, "objectives": ["prefill_latency_s"]}, ConfigError, "prompt_tokens"),
        ({"objectives": ["accuracy", "perplexity"]}, ConfigError, "objective 'perplexity' needs a task whose metric"),
        ({"tasks": [{"task": "TASK", "metric": "f1"}]}, TaskError, "f1"),
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
    config["space"].setdefault("limits", {"reduction": {"max": 0.5}})
    if "enqueue" in change and len(change["enqueue"]) == 2:
        config["space"] = {**config["space"], "limits": {"reduction": {"max": 0.2}}}
        config["space"]["groups"]["roles"] = "together"
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
    kept, dropped = resolve_objectives(config, None, begun_with=["accuracy"])
    assert kept == objectives_named(["accuracy"])
    assert dropped == {"energy_per_token_j": "this study was begun without it"}
    with pytest.raises(MeterUnavailableError, match="was begun with objective 'energy_per_token_j'"):
        resolve_objectives(config, "there is none", begun_with=["accuracy", "energy_per_token_j"])


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(tiny_folder: Path, tmp_path: Path, small_disk: Path) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 8})
    out, filler = small_disk / "run", small_disk / "filler"
    expected = run_study(config, out=tmp_path / "expected")

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(b"x" * 4096):
                pass

    with pytest.raises(StorageFullError) as caught:
        run_study(config, out=out, listener=Watcher(before={3: fill}))
    assert "full" in str(caught.value)
    assert "\n" not in str(caught.value)
    for _ in range(2):  # as long as the disk is full, nothing changes
        with pytest.raises(StorageFullError):
            run_study(config, out=out)
    assert [record.trial for record in open_study(out).records] == [0, 1, 2]
    filler.unlink()
    study = run_study(config, out=out)
    assert study.evaluated_trials == 8
    assert outcome(study) == outcome(expected)
