"""Several trials in flight: what the driver proposes, and what it stores, whatever order they finish in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from study_support import SMALL_SPACE
from tiny_study import tiny_study
from worker_support import check_complete, worker_study

from dse.config import parse_study
from dse.study import Study, StudyListener, run_study
from dse.study.driver import StudyDriver
from dse.study.folder import StudyFolder
from dse.study.resume import resume_or_start
from dse.trial_record import EVALUATED_STATES
from dse.workers.interface import FinishedJob, LocalWorker
from dse.workers.listener import Interrupts
from dse.workers.setup import prepare_study


class OutOfOrder(LocalWorker):
    """As many workers as asked for, in this process; their jobs finish in random order."""

    def __init__(self, config: dict[str, Any], count: int, seed: int) -> None:
        super().__init__(prepare_study(parse_study(config), StudyListener()), StudyListener(), Interrupts())
        self.count, self._generator = count, random.Random(seed)
        self.most_in_flight = 0

    def next_finished(self) -> FinishedJob:
        self.most_in_flight = max(self.most_in_flight, len(self._submitted))
        self._submitted.rotate(self._generator.randrange(len(self._submitted)))
        return super().next_finished()


def driven(workers: OutOfOrder, out: Path) -> Study:
    folder = StudyFolder(out)
    out.mkdir()
    folder.write_config(workers.outline.config)
    driver = StudyDriver(workers, folder, StudyListener(), Interrupts())
    with driver.closing():
        driver.search_until_spent(resume_or_start(driver))
    return Study(out)


@pytest.mark.parametrize("seed", [0, 1])
def test_points_that_depend_on_no_result_are_the_same_in_every_order(
    tiny_folder: Path, tmp_path: Path, seed: int
) -> None:
    config = worker_study(tiny_folder, 16)
    workers = OutOfOrder(config, 4, seed)
    study = driven(workers, tmp_path / "parallel")
    assert workers.most_in_flight == 5  # one per worker, and one that waits
    check_complete(study, 16, run_study(config, out=tmp_path / "one"))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_no_point_is_evaluated_twice(tiny_folder: Path, tmp_path: Path, sampler: str) -> None:
    config = tiny_study(tiny_folder, sampler={"name": sampler}, budget={"trials": 20})
    study = driven(OutOfOrder(config, 4, 0), tmp_path / "run")
    points = [record.point_id for record in study.records if record.state in EVALUATED_STATES]
    assert len(points) == len(set(points)) == 20


def test_a_small_space_is_exhausted_once(tiny_folder: Path, tmp_path: Path) -> None:
    """Nine points: with several in flight, proposals repeat pending points, which are settled with their results."""
    config = tiny_study(tiny_folder, space=SMALL_SPACE, budget={"trials": 20}, search="off")
    study = driven(OutOfOrder(config, 4, 3), tmp_path / "run")
    points = {record.point_id: record for record in study.records if record.state in EVALUATED_STATES}
    assert len(points) == study.evaluated_trials == 9
    assert study.is_exhausted
    repeats = [record for record in study.records if record.state == "duplicate"]
    assert repeats
    for record in repeats:
        assert record.duplicate_of == points[record.point_id].trial
        assert record.value("accuracy") == points[record.point_id].value("accuracy")
