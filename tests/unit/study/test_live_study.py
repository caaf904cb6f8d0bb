from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from dse.errors import StorageFullError, StudyError
from dse.report.worker_lanes import WorkerLane, read_lanes, write_lanes
from dse.study import StudyListener, StudyProgress, open_study
from dse.study.live_study import LiveStudy
from dse.workers.lane_listener import LaneListener


def test_a_snapshot_follows_the_study_trial_by_trial(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "run", budget=9)
    live = LiveStudy(tmp_path / "run")
    assert live.snapshot().evaluated == 0  # not started
    study.fill(6)
    before = live.snapshot()
    assert live.snapshot() is before
    study.finish()
    study.start_trial(queue=1)
    after = live.snapshot()
    assert [entry.state for entry in after.pending] == ["running", "queued"]
    assert after.trials_version != before.trials_version
    assert after.records[3] is before.records[3]  # not read again
    whole = open_study(tmp_path / "run")
    pd.testing.assert_frame_equal(after.trials, whole.trials())
    assert after.steps[-1].volume == pytest.approx(whole.hypervolume)
    gained = {share.origin: share.hypervolume_gained for share in whole.origin_shares}
    for origin, expected in gained.items():
        assert sum(s.gained for s in after.steps if s.origin == origin) == pytest.approx(expected, abs=1e-12)
    study.close()


def test_pending_trials_have_their_exact_costs(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "run").fill(2)
    study.start_trial(queue=1, lanes=[])  # no worker tells: the costs come from the stored points
    running, queued = LiveStudy(tmp_path / "run").snapshot().pending
    study.close()
    for entry in (running, queued):
        assert 0 < entry.known["reduction"] < 1
        assert entry.known["parameters"] == pytest.approx(
            study.topology.parameters_dense * (1 - entry.known["reduction"])
        )
        assert entry.point_id
    assert running.started_s is not None
    assert queued.started_s is None


def test_a_revised_record_is_seen_once(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "run").fill(4)
    live = LiveStudy(tmp_path / "run")
    before = live.snapshot()
    study.storage.revise(dataclasses.replace(study.records[2], why="another reason"))
    revised = live.snapshot()
    assert revised.records[2].why == "another reason"
    assert revised.trials_version != before.trials_version
    write_lanes(study.folder.workers, [WorkerLane("worker 1")])
    later = live.snapshot()
    assert later.lanes
    assert later.trials_version == revised.trials_version
    study.close()


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study\.yaml"):
        LiveStudy(tmp_path)


def test_the_listener_writes_what_the_worker_does(tmp_path: Path) -> None:
    record = SyntheticStudy(tmp_path / "run").fill(1).records[0]
    path, progress = tmp_path / "workers.json", StudyProgress(0, 3)
    with LaneListener(StudyListener(), path) as listener:
        listener.on_phase("factor bank", 1, 2)
        assert read_lanes(path) == ()  # nothing before the first trial: the folder may still be refused
        listener.on_trial_start(progress, record)
        (lane,) = read_lanes(path)
        assert (lane.state, lane.trial, lane.origin) == ("working", 0, "dense")
        assert lane.cost["reduction"] == 0.0
        for number in (1, 2):
            listener.on_trial_end(progress, dataclasses.replace(record, trial=number, state="failed", reason="boom"))
        listener.on_trial_start(progress, dataclasses.replace(record, trial=3))
        (lane,) = read_lanes(path)
        assert (lane.finished, lane.failures, lane.failures_in_a_row, lane.last_failure) == (2, 2, 2, "boom")
    (lane,) = read_lanes(path)
    assert (lane.state, lane.trial) == ("ended", None)


def test_a_full_disk_does_not_end_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = SyntheticStudy(tmp_path / "run").fill(1).records[0]

    def full(*_arguments: object) -> None:
        raise StorageFullError("the disk is full")

    monkeypatch.setattr("dse.workers.lane_listener.write_lanes", full)
    with LaneListener(StudyListener(), tmp_path / "workers.json") as listener:
        listener.on_trial_start(StudyProgress(0, 3), record)
