"""Everything that can stop a study, and how the study resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from study_support import SMALL_SPACE, Watcher, evaluated, fill_disk, interrupt, points_and_accuracies
from tiny_models import save_tiny_model
from tiny_study import environment, merged, save_choice_task, tiny_study, write_study

from dse.cli import main
from dse.config import parse_study
from dse.errors import StorageFullError, StudyError
from dse.study import open_study, run_study
from dse.study.storage import StudyStorage


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_resumed_study_proposes_what_an_uninterrupted_one_would(
    tiny_folder: Path, tmp_path: Path, sampler: str
) -> None:
    config = tiny_study(tiny_folder, sampler={"name": sampler}, budget={"trials": 12})
    whole = run_study(config, out=tmp_path / "whole")
    # Stopped before the evaluation of the third trial, then twice during an evaluation.
    for watcher in (
        Watcher(before={2: interrupt}),
        Watcher(during={6: interrupt}),
        Watcher(during={9: interrupt}),
    ):
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "stopped", listener=watcher)
    resumed = run_study(config, out=tmp_path / "stopped")
    # An interrupted trial is evaluated again under its own number.
    assert [(r.trial, r.state, r.origin, r.point_id) for r in resumed.records] == [
        (r.trial, r.state, r.origin, r.point_id) for r in whole.records
    ]
    assert points_and_accuracies(resumed) == points_and_accuracies(whole)
    assert resumed.evaluated_trials == 12
    assert resumed.attributes["reference"] == whole.attributes["reference"]
    assert resumed.hypervolume == pytest.approx(whole.hypervolume)


# --- processes ---


@dataclass
class Running:
    """`dse run` of a study whose trials take about a second, in a process of its own."""

    process: subprocess.Popen[str]
    log: Path

    def wait_for_trial(self, number: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.log.exists() and f" trial {number}: point " in self.log.read_text(encoding="utf-8"):
                return
            time.sleep(0.005)
        self.process.kill()
        raise AssertionError(self.process.communicate()[1])

    def end(self, how: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(how)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def start(cache_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    processes: list[subprocess.Popen[str]] = []

    def start_(*arguments: str) -> Running:
        command = [sys.executable, "-m", "dse.cli", "run", *arguments, "--out", str(tmp_path / "run")]
        process = subprocess.Popen(
            command, env=environment(cache_folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return Running(process, tmp_path / "run" / "run.log")

    yield start_
    for process in processes:
        process.kill()
        process.communicate()


def slow_study(folder: Path) -> dict[str, Any]:
    return tiny_study(
        folder, objectives=["accuracy", "decode_latency_s"], measurement={"blocks": 40}, budget={"trials": 6}
    )


@pytest.fixture(scope="module")
def undisturbed(
    tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, float | None]]:
    """The result of the slow study; its random points depend on no objective, so that it can be faster here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        config = tiny_study(tiny_folder, budget={"trials": 6})
        return points_and_accuracies(run_study(config, out=tmp_path_factory.mktemp("undisturbed") / "run"))


def test_kill_in_the_middle_of_a_trial(
    tiny_folder: Path, tmp_path: Path, start: Callable[..., Running], undisturbed: list[tuple[str, float | None]]
) -> None:
    study_yaml = write_study(tmp_path / "study.yaml", slow_study(tiny_folder))
    running = start(str(study_yaml))
    running.wait_for_trial(2)
    assert running.end(signal.SIGKILL)[0] == -signal.SIGKILL
    storage = StudyStorage.open_existing(tmp_path / "run" / "study.db")
    (unfinished,) = storage.unfinished({})
    records = storage.records()
    storage.close()
    assert unfinished.trial == 2
    assert [(record.trial, record.state) for record in records] == [(0, "complete"), (1, "complete")]
    watcher = Watcher()
    study = run_study(study_yaml, out=tmp_path / "run", listener=watcher)
    assert "resuming: 2 of 6 trials are done" in watcher.messages
    assert study.records[:2] == records
    assert (study.records[2].trial, study.records[2].state) == (2, "complete")
    assert points_and_accuracies(study) == undisturbed


def test_ctrl_c_and_termination_end_cleanly(
    tiny_folder: Path, tmp_path: Path, start: Callable[..., Running], undisturbed: list[tuple[str, float | None]]
) -> None:
    study_yaml = write_study(tmp_path / "a study.yaml", slow_study(tiny_folder))
    out = tmp_path / "run"
    running = start(str(study_yaml), "--trials", "6")
    running.wait_for_trial(1)
    # A second process on the same folder is refused and has no effect.
    with pytest.raises(StudyError, match="one process at a time may run a study, but another one runs"):
        run_study(study_yaml, out=out)
    for how, finished in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        if how == signal.SIGTERM:
            running = start(str(study_yaml), "--trials", "6")
            running.wait_for_trial(2)
        code, stdout, stderr = running.end(how)
        assert code == 130, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
        assert stderr.endswith(
            "stopped; every finished trial is stored. Continue with:\n"
            f"  dse run '{study_yaml}' --trials 6 --out {out}\n"
        )
        study = open_study(out)
        assert study.evaluated_trials == finished
        assert [record.state for record in study.records] == ["complete"] * finished
        assert len(pd.read_csv(out / "trials.csv")) == len(study.records)
    assert points_and_accuracies(run_study(study_yaml, out=out)) == undisturbed


# --- what has changed since ---


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_dense_model_comes_first_even_if_it_was_interrupted(tiny_folder: Path, tmp_path: Path, how: str) -> None:
    config = tiny_study(tiny_folder, enqueue=[{"method": "svd", "rank": 6, "roles": ["up"]}])
    watcher = Watcher(before={0: interrupt}) if how == "killed" else Watcher(during={0: interrupt})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "run", listener=watcher)
        watcher = Watcher(during={0: interrupt})
    study = run_study(config, out=tmp_path / "run")
    assert [(record.state, record.origin) for record in study.records[:2]] == [
        ("complete", "dense"), ("complete", "enqueued"),
    ]  # fmt: skip
    assert study.attributes["reference"]["parameters"] == 1.1 * study.records[0].cost["parameters_dense"]
    first = study.records[1]
    assert first.accuracy_drop is not None
    assert first.accuracy_drop.low is not None
    assert study.evaluated_trials == 5


def test_more_trials_resume_and_a_complete_study_returns_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    save_choice_task(tmp_path)
    config = tiny_study(tmp_path, budget={"trials": 3})
    first = run_study(config, out=tmp_path / "run")
    watcher = Watcher()
    second = run_study(config, out=tmp_path / "run", trials=6, listener=watcher)
    assert watcher.messages[-1] == "resuming: 3 of 6 trials are done"
    assert watcher.started == [record.trial for record in evaluated(second)[3:]]
    assert second.records[: len(first.records)] == first.records
    assert second.evaluated_trials == 6
    assert second.config.budget.trials == 6
    assert second.attributes["reference"] == first.attributes["reference"]
    assert second.attributes["facts"] == first.attributes["facts"]
    shutil.rmtree(tmp_path / "model")  # a complete study needs no model
    (second.folder.front_html).unlink()
    watcher = Watcher()
    third = run_study(config, out=tmp_path / "run", trials=6, listener=watcher)
    assert watcher.messages == ["complete: all 6 trials are done"]
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


def test_a_study_in_the_removed_mode_fast_opens_but_does_not_resume(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 2})
    before = run_study(config, out=tmp_path / "run")
    stored = tmp_path / "run" / "study.yaml"
    stored.write_text(stored.read_text().replace("mode: eager", "mode: fast"))
    assert open_study(tmp_path / "run").records == before.records
    with pytest.raises(StudyError, match="holds latencies of mode `fast`, which was removed"):
        run_study(config, out=tmp_path / "run", trials=3)


def test_a_study_without_evaluated_trials_is_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny_study(tiny_folder), out=tmp_path / "run", listener=Watcher(during={0: interrupt}))
    config = tiny_study(tiny_folder, objectives=["accuracy", "parameters", "weight_bytes"], budget={"trials": 2})
    study = run_study(config, out=tmp_path / "run")
    assert [record.state for record in study.records] == ["complete", "complete"]
    assert len(study.objectives) == 3


def test_a_folder_that_is_not_a_study_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(StudyError, match="exists and is not a study"):
            run_study(config, out=tmp_path / name)
    with pytest.raises(StudyError, match="File name too long"):
        run_study(config, out=tmp_path / ("x" * 300))
    with pytest.raises(StorageFullError, match="choose another folder"):
        run_study(config, out=tmp_path / "file" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_model_and_tasks_are_checked_when_a_study_resumes(tmp_path: Path) -> None:
    save_choice_task(tmp_path)
    save_tiny_model(tmp_path / "model")
    config = tiny_study(tmp_path, budget={"trials": 2})
    run_study(config, out=tmp_path / "run")
    save_tiny_model(tmp_path / "model", seed=6)
    with pytest.raises(StudyError, match="started with other model weights"):
        run_study(config, out=tmp_path / "run", trials=3)
    save_tiny_model(tmp_path / "model")
    data = tmp_path / "tiny_choice.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["gold"] = (rows[3]["gold"] + 1) % 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StudyError, match="started with other tasks, documents or lm-eval version"):
        run_study(config, out=tmp_path / "run", trials=3)
    save_choice_task(tmp_path)
    assert run_study(config, out=tmp_path / "run", trials=3).evaluated_trials == 3
    # Every paired drop refers to the dense model's outcomes: without them the study cannot resume.
    open_study(tmp_path / "run").folder.outcomes(0).write_bytes(b"damaged")
    with pytest.raises(StudyError, match="damaged"):
        run_study(config, out=tmp_path / "run", trials=4)
    assert open_study(tmp_path / "run").evaluated_trials == 3


def test_a_full_disk_loses_nothing(
    tiny_folder: Path, tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str], own_process: None
) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 8})
    out, filler = small_disk / "run", small_disk / "filler"
    expected = run_study(config, out=tmp_path / "expected")

    with pytest.raises(StorageFullError) as caught:
        run_study(config, out=out, listener=Watcher(before={3: lambda: fill_disk(filler)}))
    assert "full" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err  # nor of a log that could not be written
    study_yaml = write_study(tmp_path / "study.yaml", config)
    for _ in range(2):  # as long as the disk is full, nothing changes
        assert main(["run", str(study_yaml), "--out", str(out)]) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert [line[:11] for line in printed.err.splitlines() if "loading" not in line] == ["dse: error:"]
    assert [record.trial for record in open_study(out).records] == [0, 1, 2]
    filler.unlink()
    study = run_study(config, out=out)
    assert study.evaluated_trials == 8
    assert points_and_accuracies(study) == points_and_accuracies(expected)
