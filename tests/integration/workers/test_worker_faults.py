"""Workers, nodes and drivers that die: nothing finished is lost, and the study ends like an undisturbed one."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from study_support import Watcher, points_and_accuracies
from tiny_study import tiny_study
from worker_support import Killer, check_complete, lanes, worker_study

from dse.study import Study, StudyProgress, run_study
from dse.trial_record import TrialRecord

TRIALS = 24

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own threads and sockets


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        return run_study(worker_study(tiny_folder, TRIALS), out=tmp_path_factory.mktemp("undisturbed") / "run")


@dataclass
class KillsTrial(Watcher):
    """Kills every worker that evaluates the third trial."""

    study: Path = Path()
    killed: list[int] = field(default_factory=list)


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
    removed = []

    class RemovesNode(Watcher):
        def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
            if progress.finished == 8:
                node = next(iter(ray_cluster.worker_nodes))
                removed.append(node)
                ray_cluster.remove_node(node, allow_graceful=False)
                ray_cluster.add_node(num_cpus=1, num_gpus=1)

    out = tmp_path / "run"
    with Killer(out, kills=4, between_s=(0.1, 1.0)).running() as killer:
        study = run_study(
            worker_study(tiny_folder, TRIALS),
            out=out,
            use_cache=False,
            listener=RemovesNode(),
            workers=on(ray_cluster, 3),
        )
    assert removed
    assert killer.log
    check_complete(study, TRIALS, undisturbed)


def test_a_worker_that_hangs_is_restarted(
    ray_cluster: Any, tiny_folder: Path, tmp_path: Path, undisturbed: Study
) -> None:
    stopped: list[int] = []
    out = tmp_path / "run"

    class Stops(Watcher):
        def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
            if progress.finished == 4 and not stopped:
                stopped.append(lanes(out)[0].pid)
                os.kill(stopped[0], signal.SIGSTOP)

    watcher = Stops()
    study = run_study(
        worker_study(tiny_folder, TRIALS), out=out, listener=watcher, workers=on(ray_cluster, 2, trial_timeout_s=10)
    )
    check_complete(study, TRIALS, undisturbed)
    assert stopped
    assert any("restarts; the trial is repeated" in message for message in watcher.messages)
