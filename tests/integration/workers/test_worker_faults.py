"""Workers, nodes and drivers that die: nothing finished is lost, and the study ends like an undisturbed one."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from preloaded_python import Process
from study_support import Watcher, fill_disk, points_and_accuracies
from tiny_study import tiny_study, write_study
from worker_support import RayNodes, check_complete, wait_until, worker_study

from dse.cli.options import EXIT_INTERRUPTED
from dse.errors import StorageFullError
from dse.study import Study, StudyProgress, open_study, run_study
from dse.trial_record import EVALUATED_STATES, TrialRecord

TRIALS = 16

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own threads and sockets


@pytest.fixture(scope="module")
def undisturbed(nodes: RayNodes, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run_study(worker_study(tiny_folder, TRIALS), out=tmp_path_factory.mktemp("undisturbed") / "run")


class AfterTrial(Watcher):
    """Calls each function once when its number of trials are finished."""

    def __init__(self, do: dict[int, Callable[[], object]]) -> None:
        super().__init__()
        self._do = do

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        for finished in [number for number in self._do if progress.finished >= number]:
            self._do.pop(finished)()

    @property
    def is_done(self) -> bool:
        return not self._do


def test_one_worker_proposes_what_a_study_without_ray_does(nodes: RayNodes, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, sampler={"name": "tpe"}, budget={"trials": 14})
    here = run_study(config, out=tmp_path / "here")
    there = run_study(config, out=tmp_path / "there", workers=nodes.keys(1))
    assert points_and_accuracies(there) == points_and_accuracies(here)
    assert [(r.origin, r.why) for r in there.records] == [(r.origin, r.why) for r in here.records]
    assert there.attributes["reference"] == here.attributes["reference"]


def test_killed_and_stuck_workers_and_a_removed_node(
    nodes: RayNodes, tiny_folder: Path, tmp_path: Path, undisturbed: Study
) -> None:
    def send(number: int) -> None:
        assert nodes.workers()[0].send(number)

    def remove_node() -> None:
        nodes.remove(nodes.nodes[0])
        nodes.add()

    watcher = AfterTrial({3: lambda: send(signal.SIGKILL), 6: lambda: send(signal.SIGSTOP), 10: remove_node})
    study = run_study(
        worker_study(tiny_folder, TRIALS),
        out=tmp_path / "run",
        use_cache=False,
        listener=watcher,
        workers=nodes.keys(2, trial_timeout_s=15),
    )
    assert watcher.is_done
    assert any("restarts; the trial is repeated" in message for message in watcher.messages)
    check_complete(study, TRIALS, undisturbed)


def test_a_killed_and_a_stopped_driver_resume_with_fewer_and_more_workers(
    nodes: RayNodes, tiny_folder: Path, tmp_path: Path, undisturbed: Study
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    config = worker_study(tiny_folder, TRIALS)

    def start(workers: int, finished: int) -> Process:
        study_yaml = write_study(tmp_path / "study.yaml", {**config, "workers": nodes.keys(workers, slow_s=1.0)})
        arguments = ["-m", "dse.cli", "run", str(study_yaml), "--out", str(out), "--no-cache", "--grace", "60"]
        driver = nodes.preloaded.start(arguments, nodes.environment, log)
        wait_until(lambda: _rows(out) >= finished or driver.wait(0.01) is not None)
        return driver

    driver = start(1, finished=3)
    driver.kill()
    assert driver.wait(60) == -signal.SIGKILL, log.read_text()
    before = open_study(out).records
    driver = start(2, finished=7)
    wait_until(lambda: any(worker.method == "run" for worker in nodes.workers()))
    driver.kill(signal.SIGINT)
    assert driver.wait(120) == EXIT_INTERRUPTED, log.read_text()
    logged = log.read_text().partition("stopping: ")[2]
    assert re.match(r"(1 trial has|2 trials have) 60 s to finish", logged)
    assert logged.count("] trial ") == int(logged[0])  # all of them have finished
    assert "stopped; every finished trial is stored" in log.read_text()
    stopped = open_study(out)
    assert stopped.records[: len(before)] == before
    study = run_study(config, out=out, workers=nodes.keys(1))
    assert study.records[: len(stopped.records)] == stopped.records
    check_complete(study, TRIALS, undisturbed)


def test_a_point_that_ends_three_workers_is_not_tried_again(nodes: RayNodes, tiny_folder: Path, tmp_path: Path) -> None:
    config = worker_study(tiny_folder, 4)
    kills: list[int] = []

    def kill_in_trial() -> None:
        def kill() -> None:
            while len(kills) < 3:
                for worker in nodes.workers():
                    if worker.pid not in kills and nodes.kill_within(worker, "run"):
                        kills.append(worker.pid)

        threading.Thread(target=kill).start()

    watcher = Watcher(before={2: kill_in_trial})
    workers = nodes.keys(1, slow_s=3.0)
    study = run_study(config, out=tmp_path / "run", use_cache=False, listener=watcher, workers=workers)
    assert len(kills) == 3
    (failed,) = [record for record in study.records if record.state == "failed"]
    assert failed.reason.startswith("3 workers ended in it, the last one because: ")
    assert study.evaluated_trials == 4
    assert sum(record.point_id == failed.point_id for record in study.records if record.state in EVALUATED_STATES) == 1
    # The next run does not try it again either.
    more = run_study(config, out=tmp_path / "run", trials=5)
    assert more.records[: len(study.records)] == study.records
    assert more.evaluated_trials == 5


def test_a_full_disk_at_the_driver_loses_nothing(
    nodes: RayNodes, tiny_folder: Path, small_disk: Path, undisturbed: Study
) -> None:
    config = worker_study(tiny_folder, TRIALS)
    out, filler = small_disk / "run", small_disk / "filler"
    with pytest.raises(StorageFullError, match="full"):
        run_study(config, out=out, listener=Watcher(before={3: lambda: fill_disk(filler)}), workers=nodes.keys(2))
    filler.unlink()
    before = open_study(out).records
    assert before
    study = run_study(config, out=out, workers=nodes.keys(2))
    assert study.records[: len(before)] == before
    check_complete(study, TRIALS, undisturbed)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--workers", "3"], "`workers <= 2` must hold for 1 GPU each on nodes with 0, 1, 1 GPUs, but got 3"),
        (["--workers", "1", "--gpus-per-worker", "2"], "`workers <= 0` must hold for 2 GPUs each"),
        (["--ray-address", "127.0.0.1:1"], "a Ray cluster must listen at '127.0.0.1:1', but none does"),
        (["--ray-address", "nowhere"], "`ray_address` must be auto or HOST:PORT, but got 'nowhere'"),
    ],
)
def test_bad_input_ends_with_one_line(
    nodes: RayNodes,
    tiny_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    own_process: None,
    options: list[str],
    rule: str,
) -> None:
    from dse.cli import main

    study_yaml = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder))
    command = ["run", str(study_yaml), "--out", str(tmp_path / "run"), "--ray-address", nodes.address, *options]
    assert main(command) == 2
    printed = capfd.readouterr()
    # Ray may report nodes that an earlier test removed.
    (line,) = [line for line in printed.err.splitlines() if line.startswith("dse: error: ")]
    assert rule in line
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


def _rows(out: Path) -> int:
    path = out / "trials.csv"
    return len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.exists() else 0
