from __future__ import annotations

import dataclasses
import os
import socket
from typing import Any

import pytest

from dse.report.dashboard import StudySnapshot, VolumeStep
from dse.report.dashboard.health import Notice, health_of
from dse.report.worker_lanes import WorkerLane

NOW_S = 1_800_000_000.0


def _lane(**changes: Any) -> WorkerLane:
    return WorkerLane("worker 1", "working", host=socket.gethostname(), pid=os.getpid(), updated_s=NOW_S, **changes)


def _found(snapshot: StudySnapshot, words: str) -> Notice | None:
    return next((notice for notice in health_of(snapshot, NOW_S) if words in notice.what), None)


@pytest.fixture
def healthy(snapshot: StudySnapshot) -> StudySnapshot:
    return dataclasses.replace(snapshot, lanes=(_lane(),))


def test_noise_names_the_documents_that_would_do(healthy: StudySnapshot) -> None:
    notice = _found(healthy, "noise is too large")
    assert notice is not None
    assert notice.level == "warning"
    assert "300 documents" in notice.what
    precise = healthy.trials.assign(accuracy_drop_detectable=0.01)
    assert _found(dataclasses.replace(healthy, trials=precise), "noise is too large") is None


def test_noise_of_a_cost_beside_its_saving(healthy: StudySnapshot) -> None:
    assert _found(healthy, "decode latency") is None
    noisy = healthy.trials.assign(decode_latency_s_ratio_low=0.5, decode_latency_s_ratio_high=1.5)
    notice = _found(dataclasses.replace(healthy, trials=noisy), "decode latency")
    assert notice is not None
    assert "measurement.precision" in notice.remedy


@pytest.mark.parametrize(("value", "is_at_chance"), [(0.27, True), (0.46, False)])
def test_a_task_at_chance(healthy: StudySnapshot, value: float, is_at_chance: bool) -> None:
    tasks = {"openbook_qa": {"metrics": {"acc": (value, 0.035)}, "documents": 150}}
    records = {**healthy.records, 0: dataclasses.replace(healthy.records[0], tasks=tasks)}
    notice = _found(dataclasses.replace(healthy, records=records), "at chance")
    assert (notice is not None) == is_at_chance


def test_a_worker_that_fails_again_and_again(healthy: StudySnapshot) -> None:
    lane = _lane(failures_in_a_row=3, last_failure="OutOfMemoryError: the device must have room")
    notice = _found(dataclasses.replace(healthy, lanes=(lane,)), "3 trials in a row")
    assert notice is not None
    assert notice.level == "problem"
    assert "evaluation.batch_size" in notice.remedy
    assert _found(healthy, "in a row") is None


def test_failures_in_a_row_without_lanes(healthy: StudySnapshot) -> None:
    last = sorted(healthy.records)[-3:]
    failed = {t: dataclasses.replace(healthy.records[t], state="failed", reason="boom") for t in last}
    broken = dataclasses.replace(healthy, records={**healthy.records, **failed}, lanes=())
    assert _found(broken, "trials have all failed") is not None


def test_a_worker_that_died(healthy: StudySnapshot) -> None:
    dead = dataclasses.replace(_lane(), pid=2**22 + 1)  # beyond the largest process id of Linux
    notice = _found(dataclasses.replace(healthy, lanes=(dead,)), "no longer runs")
    assert notice is not None
    assert "dse run" in notice.remedy
    ended = dataclasses.replace(dead, state="ended")
    assert _found(dataclasses.replace(healthy, lanes=(ended,)), "no longer runs") is None


def test_a_throttled_device(healthy: StudySnapshot) -> None:
    condition = {"device": "cuda:0", "throttled_by": ["hw_thermal_slowdown"]}
    hot = dataclasses.replace(healthy.records[15], energy={"decode": {"conditions_after": [condition]}})
    notice = _found(dataclasses.replace(healthy, records={**healthy.records, 15: hot}), "throttled")
    assert notice is not None
    assert "cuda:0" in notice.what
    assert "hw_thermal_slowdown" in notice.what
    assert _found(healthy, "throttled") is None


def test_a_proposer_that_gains_nothing(healthy: StudySnapshot) -> None:
    steps = [VolumeStep(i, "refined" if i % 2 else "sampler", 0.0 if i % 2 else 0.01, 0.01 * i) for i in range(1, 30)]
    notice = _found(dataclasses.replace(healthy, steps=tuple(steps)), "Proposer refined gained nothing")
    assert notice is not None
    assert "refinement: false" in notice.remedy
    every = [VolumeStep(i, "refined" if i % 2 else "sampler", 0.01, 0.01 * i) for i in range(1, 30)]
    assert _found(dataclasses.replace(healthy, steps=tuple(every)), "gained nothing") is None


def test_a_search_that_converged(healthy: StudySnapshot) -> None:
    steps = tuple(VolumeStep(i, "sampler", 0.1 if i == 0 else 0.0, 0.1) for i in range(40))
    assert _found(dataclasses.replace(healthy, steps=steps, budget=99), "added nothing to the hypervolume") is not None


def test_the_most_serious_comes_first(healthy: StudySnapshot) -> None:
    levels = [n.level for n in health_of(dataclasses.replace(healthy, lanes=(_lane(failures_in_a_row=9),)), NOW_S)]
    assert levels == sorted(levels, key=["problem", "warning", "note"].index)
    assert levels[0] == "problem"
