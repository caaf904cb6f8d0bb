"""Workers, nodes and drivers that die: nothing finished is lost, and the study ends like an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_support import Watcher, points_and_accuracies
from tiny_study import environment, tiny_study, write_study
from worker_support import Killer, check_complete, lanes, wait_until, worker_study

from dse.errors import ConfigError
from dse.study import Study, StudyProgress, open_study, run_study
from dse.trial_record import TrialRecord

TRIALS = 16

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own threads and sockets


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        return run_study(worker_study(tiny_folder, TRIALS), out=tmp_path_factory.mktemp("undisturbed") / "run")


class AtTrial(Watcher):
    """Calls a function once when a number of trials are finished."""

    def __init__(self, finished: int, do: Callable[[], None]) -> None:
        super().__init__()
        self._at, self._do, self.is_done = finished, do, False

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        if progress.finished >= self._at and not self.is_done:
            self.is_done = True
            self._do()


def on(cluster: Any, count: int, **keys: Any) -> dict[str, Any]:
    return {"ray_address": cluster.address, "count": count, **keys}


def test_one_worker_proposes_what_a_study_without_ray_does(ray_cluster: Any, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, sampler={"name": "tpe"}, budget={"trials": 14})
    here = run_study(config, out=tmp_path / "here")
    there = run_study(config, out=tmp_path / "there", workers=on(ray_cluster, 1))
    assert points_and_accuracies(there) == points_and_accuracies(here)
    assert [(r.origin, r.why) for r in there.records] == [(r.origin, r.why) for r in here.records]
    assert there.attributes["reference"] == here.attributes["reference"]


def test_killed_workers_and_a_removed_node(
    ray_cluster: Any, tiny_folder: Path, tmp_path: Path, undisturbed: Study
) -> None:
    def remove_node() -> None:
        ray_cluster.remove_node(next(iter(ray_cluster.worker_nodes)), allow_graceful=False)
        ray_cluster.add_node(num_cpus=1, num_gpus=1)

    watcher, out = AtTrial(6, remove_node), tmp_path / "run"
    with Killer(out, kills=3, between_s=(0.1, 1.0)).running() as killer:
        study = run_study(
            worker_study(tiny_folder, TRIALS), out=out, use_cache=False, listener=watcher, workers=on(ray_cluster, 3)
        )
    assert watcher.is_done
    assert killer.log
    check_complete(study, TRIALS, undisturbed)


def test_a_worker_that_hangs_is_restarted(
    ray_cluster: Any, tiny_folder: Path, tmp_path: Path, undisturbed: Study
) -> None:
    out = tmp_path / "run"
    watcher = AtTrial(4, lambda: os.kill(lanes(out)[0].pid, signal.SIGSTOP))
    workers = on(ray_cluster, 2, trial_timeout_s=20)
    study = run_study(worker_study(tiny_folder, TRIALS), out=out, listener=watcher, workers=workers)
    assert watcher.is_done
    assert any("restarts; the trial is repeated" in message for message in watcher.messages)
    check_complete(study, TRIALS, undisturbed)


def test_a_killed_driver_resumes_with_fewer_and_more_workers(
    ray_cluster: Any, tiny_folder: Path, cache_folder: Path, tmp_path: Path, undisturbed: Study
) -> None:
    study_yaml, out = write_study(tmp_path / "study.yaml", worker_study(tiny_folder, TRIALS)), tmp_path / "run"
    for workers, finished in ((2, 4), (1, 8)):
        command = [sys.executable, "-m", "dse.cli", "run", str(study_yaml), "--out", str(out)]
        command += ["--workers", str(workers), "--ray-address", ray_cluster.address]
        process = subprocess.Popen(command, env=environment(cache_folder), stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda n=finished, p=process: _rows(out) >= n or p.poll() is not None)  # type: ignore[misc]
        finally:
            process.kill()
            errors = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, errors
        before = open_study(out).records
    study = run_study(study_yaml, out=out, workers=on(ray_cluster, 3))
    assert [record for record in study.records if record.trial in {r.trial for r in before}] == before
    check_complete(study, TRIALS, undisturbed)


def test_more_gpus_than_there_are(ray_cluster: Any, tiny_folder: Path, tmp_path: Path) -> None:
    for workers in (on(ray_cluster, 4), on(ray_cluster, 2, gpus_per_worker=2)):
        with pytest.raises(ConfigError, match=r"`workers <= [03]` must hold for \d GPUs? each on nodes with"):
            run_study(tiny_study(tiny_folder), out=tmp_path / "run", workers=workers)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_no_ray_at_the_address(tiny_folder: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="ray"):
        run_study(tiny_study(tiny_folder), out=tmp_path / "run", workers={"ray_address": address})


def _rows(out: Path) -> int:
    path = out / "trials.csv"
    return len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.exists() else 0
