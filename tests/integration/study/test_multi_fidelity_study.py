"""Whole multi-fidelity studies: records, kills between rungs, the end of a study, and cached answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_support import Watcher, evaluated, points_and_accuracies
from tiny_models import save_tiny_model
from tiny_study import save_choice_task, tiny_study

from dse.errors import ConfigError, TaskError
from dse.study import Study, open_study, run_study

RUNGS: dict[str, Any] = {"proxy_tokens": 256, "shares": [0.2, 0.5], "min_gain": 0.01, "resume_stopped": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every document right, so that accuracy falls as a point departs from it."""
    place = tmp_path_factory.mktemp("rungs")
    save_tiny_model(place / "model")
    save_choice_task(place, documents=160)
    _make_the_models_answers_right(place)
    return place


def _make_the_models_answers_right(place: Path) -> None:
    from dse.evaluation import Answers, Evaluator, TaskSpec
    from dse.models import load_model

    answers, data = Answers(), place / "tiny_choice.jsonl"
    evaluator = Evaluator(load_model(str(place / "model")), [TaskSpec(str(place / "tiny_choice.yaml"))])
    evaluator.evaluate(answers=answers)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row, digest in zip(rows, evaluator.digests(), strict=True):
        scores = [repeats[0][0] for repeats in answers.by_document[digest]]  # type: ignore[index]
        row["gold"] = scores.index(max(scores))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rung_study(place: Path, **changes: Any) -> dict[str, Any]:
    fidelity = {**RUNGS, **changes.pop("fidelity", {})}
    settings = {"budget": {"trials": 18}, "evaluation": {"limit": 100}, **changes}
    return tiny_study(place, fidelity=fidelity, **settings)


@pytest.fixture(scope="module")
def study(folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        return run_study(
            rung_study(folder, fidelity={"final_documents": 50}),
            out=tmp_path_factory.mktemp("rungs") / "run",
            use_cache=False,
        )


def test_stopped_trials_count_have_a_rung_and_are_not_on_the_front(study: Study) -> None:
    table = study.trials().set_index("trial")
    stopped = table[table["state"] == "stopped"]
    assert study.evaluated_trials == len(evaluated(study)) == 18
    assert len(stopped) >= 3
    assert set(stopped["rung"]) <= {1, 2, 3}
    assert not stopped["on_front"].any()
    assert stopped["accuracy"].isna().all()
    assert (stopped["accuracy_estimate_low"] <= stopped["accuracy_estimate"]).all()
    assert stopped["reason"].str.contains("to the front's hypervolume, less than 1 %").all()
    assert set(table.loc[table["state"] == "complete", "rung"]) == {4}
    assert set(table.loc[table["state"] == "infeasible", "rung"]) <= {0}
    assert table["kl_divergence"][table["state"].isin(["complete", "stopped"])].notna().all()
    assert table.loc[0, "kl_divergence"] == 0.0


def test_the_front_is_confirmed_on_final_documents(study: Study, folder: Path) -> None:
    table = study.trials().set_index("trial")
    front = table[table["on_front"]]
    assert (front["final_documents"] == 50).all()
    assert table.loc[0, "final_documents"] == 50
    assert front["accuracy_search"].notna().all()
    assert set(study.attributes["final"]) >= {str(trial) for trial in front.index}
    # The documents beyond the limit, and none of the search's.
    from dse.evaluation import Evaluator, TaskSpec
    from dse.models import load_model

    loaded, task = load_model(str(folder / "model")), [TaskSpec(str(folder / "tiny_choice.yaml"))]
    searched, fresh = Evaluator(loaded, task, limit=100), Evaluator(loaded, task, limit=100, fresh=50)
    assert not set(searched.documents["tiny_choice"]) & set(fresh.documents["tiny_choice"])
    assert len(fresh.documents["tiny_choice"]) == 50
    assert fresh.evaluate().accuracy == pytest.approx(table.loc[0, "accuracy"])
    assert open_study(study.folder.path).trials().equals(study.trials())


def test_too_many_final_documents_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"must have 61 documents beyond its limit \(100\), but has 60"):
        run_study(rung_study(folder, fidelity={"final_documents": 61}), out=tmp_path / "run")


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_kill_loses_only_the_rung_in_progress(folder: Path, tmp_path: Path, sampler: str) -> None:
    config = rung_study(folder, sampler={"name": sampler}, budget={"trials": 16})
    whole = run_study(config, out=tmp_path / "whole", use_cache=False)

    target = next(r.trial for r in whole.records if r.rung == 4 and r.trial > 2)

    class Stopper(Watcher):
        """Stops the target trial when its first rung with documents is done."""

        trial = -1

        def on_trial_start(self, progress: Any, record: Any) -> None:
            self.trial = record.trial

        def on_phase(self, phase: str, done: int, total: int) -> None:
            if self.trial == target and phase == "evaluate" and done >= total:
                self.trial = -2
            elif self.trial == -2 and phase == "evaluate":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=tmp_path / "stopped", use_cache=False, listener=Stopper())
    assert (tmp_path / "stopped" / "answers").is_dir()
    resumed = run_study(config, out=tmp_path / "stopped", use_cache=False)
    retried = next(record for record in resumed.records if record.trial == target)
    assert retried.cached_documents == 20  # the finished share of 0.2; the share in progress is evaluated again
    assert [(r.point_id, r.state, r.rung) for r in evaluated(resumed)] == [
        (r.point_id, r.state, r.rung) for r in evaluated(whole)
    ]
    assert resumed.hypervolume == pytest.approx(whole.hypervolume)
    assert not (tmp_path / "stopped" / "answers").exists()


def test_a_study_stopped_during_the_final_evaluation_resumes_it(study: Study, folder: Path, tmp_path: Path) -> None:
    class AtTheEnd(Watcher):
        count = 0

        def on_phase(self, phase: str, done: int, total: int) -> None:
            self.count += phase == "evaluate the front" and done >= total
            if self.count == 3:
                raise KeyboardInterrupt

    config = rung_study(folder, fidelity={"final_documents": 50})
    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=tmp_path / "run", use_cache=False, listener=AtTheEnd())
    before = open_study(tmp_path / "run")
    assert before.evaluated_trials == 18
    resumed = run_study(config, out=tmp_path / "run", use_cache=False)
    assert set(before.attributes["final"]) < set(resumed.attributes["final"])
    assert resumed.attributes["final"] == study.attributes["final"]


RESUMING: dict[str, Any] = {"min_gain": 0.05, "resume_stopped": 0.002}


def test_promising_stopped_trials_resume_at_the_end(folder: Path, tmp_path: Path) -> None:
    once = run_study(rung_study(folder, fidelity={**RESUMING, "resume_stopped": None}), out=tmp_path / "once")
    config = rung_study(folder, fidelity=RESUMING)
    watcher = Watcher()
    found = run_study(config, out=tmp_path / "twice", listener=watcher)
    assert any("reconsidering" in message for message in watcher.messages)
    before = {record.trial: record for record in once.records}
    assert [record.point_id for record in found.records] == [record.point_id for record in once.records]
    resumed_trials = [record for record in found.records if "resumed at the end" in record.why]
    assert resumed_trials
    assert {before[record.trial].state for record in resumed_trials} == {"stopped"}
    assert all((record.rung or 0) >= (before[record.trial].rung or 0) for record in resumed_trials)
    completed = [record for record in resumed_trials if record.state == "complete"]
    assert completed
    assert all(record.rung == 4 and "accuracy" in record.quantities and not record.estimates for record in completed)
    others = [record for record in found.records if record not in resumed_trials]
    assert all(record.state == before[record.trial].state for record in others)
    assert found.evaluated_trials == once.evaluated_trials == 18
    assert found.hypervolume > once.hypervolume
    assert found.trials().set_index("trial").loc[[record.trial for record in completed], "accuracy"].notna().all()
    messages = Watcher()
    again = run_study(config, out=tmp_path / "twice", listener=messages)
    assert any("all 18 trials are done" in message for message in messages.messages)
    assert [record.state for record in again.records] == [record.state for record in found.records]


def test_interrupted_resuming_of_stopped_trials_continues(folder: Path, tmp_path: Path) -> None:
    config = rung_study(folder, fidelity=RESUMING)
    whole = run_study(config, out=tmp_path / "whole")

    class AtTheSecond(Watcher):
        resumed = 0

        def on_trial_start(self, progress: Any, record: Any) -> None:
            self.resumed += "resumed at the end" in record.why
            if self.resumed == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=tmp_path / "stopped", listener=AtTheSecond())
    stopped = open_study(tmp_path / "stopped")
    assert sum("resumed at the end" in record.why for record in stopped.records) == 1
    resumed = run_study(config, out=tmp_path / "stopped")
    assert [(r.point_id, r.state) for r in resumed.records] == [(r.point_id, r.state) for r in whole.records]
    assert resumed.hypervolume == pytest.approx(whole.hypervolume)


def test_a_duplicate_of_a_stopped_trial_keeps_its_estimates(folder: Path, tmp_path: Path) -> None:
    config = rung_study(folder, sampler={"name": "tpe"})
    found = run_study(config, out=tmp_path / "run")
    stopped = {record.trial for record in found.records if record.state == "stopped"}
    again = [record for record in found.records if record.duplicate_of in stopped]
    for record in again:
        assert record.state == "duplicate"
        assert "accuracy" not in record.quantities
        assert record.estimates


def test_without_rungs_no_trial_is_stopped(folder: Path, tmp_path: Path) -> None:
    config = {**rung_study(folder, budget={"trials": 6}), "fidelity": "none"}
    found = run_study(config, out=tmp_path / "run")
    assert {record.rung for record in found.records} == {None}
    assert {record.state for record in evaluated(found)} == {"complete"}


def test_a_second_study_reuses_the_answers_of_the_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    config = tiny_study(folder, evaluation={"limit": 60, "seed": 9}, budget={"trials": 4})
    first = run_study(config, out=tmp_path / "first")
    again = run_study(config, out=tmp_path / "again")
    anew = run_study(config, out=tmp_path / "anew", use_cache=False)
    assert points_and_accuracies(first) == points_and_accuracies(again) == points_and_accuracies(anew)
    assert [record.cached_documents for record in evaluated(first)] == [0, 0, 0, 0]
    assert [record.cached_documents for record in evaluated(again)] == [60, 60, 60, 60]
    assert [record.cached_documents for record in evaluated(anew)] == [0, 0, 0, 0]
    assert again.records[1].tasks == first.records[1].tasks
    assert not (tmp_path / "anew" / "answers").exists()


def test_other_factors_and_an_edited_task_miss_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    settings: dict[str, Any] = {"evaluation": {"limit": 60, "seed": 8}, "budget": {"trials": 3}}
    config = tiny_study(place, **settings)
    config["space"] = {**config["space"], "methods": ["whitened_svd"]}
    cached = {}
    for name, tokens in (("first", 2048), ("same", 2048), ("other calibration", 1024)):
        study = run_study({**config, "calibration": {"tokens": tokens, "window": 32}}, out=tmp_path / name)
        cached[name] = [record.cached_documents for record in evaluated(study)]
    assert cached == {"first": [0, 0, 0], "same": [60, 60, 60], "other calibration": [60, 0, 0]}  # dense needs none
    task = place / "tiny_choice.yaml"
    task.write_text(task.read_text().replace("{{question}}", "{{question}} on"))
    edited = run_study({**config, "calibration": {"tokens": 2048, "window": 32}}, out=tmp_path / "edited")
    assert [record.cached_documents for record in evaluated(edited)] == [0, 0, 0]


def test_kl_divergence_is_an_objective_of_its_own(folder: Path, tmp_path: Path) -> None:
    config = tiny_study(folder, objectives=["kl_divergence", "parameters"], tasks=[], budget={"trials": 5})
    found = run_study({**config, "evaluation": {"divergence_tokens": 256}}, out=tmp_path / "run")
    table = found.trials()
    assert table.loc[0, ["kl_divergence", "kl_divergence_low", "kl_divergence_high"]].tolist() == [0.0, 0.0, 0.0]
    rest = table[(table["state"] == "complete") & (table["decomposed_tensors"] > 0)]
    assert (rest["kl_divergence_low"] <= rest["kl_divergence"]).all()
    assert (rest["kl_divergence"] > 0).all()
    first, second = [record for record in found.records if record.state == "complete" and not record.is_dense][:2]
    (row,) = found.compare(first.trial, second.trial).quality
    differences = np.subtract(second.divergence_windows, first.divergence_windows)
    assert row.metric == "kl_divergence"
    assert row.change == pytest.approx(differences.mean())
    assert row.low < row.change < row.high
    assert found.hypervolume is not None
    assert found.hypervolume > 0


@pytest.mark.parametrize(
    ("fidelity", "message"),
    [
        ("automatic", "must be none, auto, or rungs"),
        ({"shares": [0.5, 0.1]}, "must ascend"),
        ({"shares": [1.0]}, "less than 1"),
        ({"min_gain": 1.0}, "less than 1"),
        ({"tell": "lies"}, "tell"),
        ({"rungs": 3}, "rungs"),
    ],
)
def test_invalid_fidelity_settings_are_refused(folder: Path, tmp_path: Path, fidelity: Any, message: str) -> None:
    config = {**tiny_study(folder), "fidelity": fidelity}
    with pytest.raises(ConfigError, match=message):
        run_study(config, out=tmp_path / "run")


def test_fidelity_needs_an_objective_on_documents(folder: Path, tmp_path: Path) -> None:
    config = tiny_study(folder, objectives=["kl_divergence", "parameters"], fidelity="auto")
    with pytest.raises(ConfigError, match="`fidelity` needs one of accuracy"):
        run_study(config, out=tmp_path / "run")
