"""The storage of a study: what is asked, told and found again, after a kill and on a damaged file too."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from dse.errors import StorageFullError, StudyError, UserError
from dse.study import SAMPLERS
from dse.study.storage import Proposal, StudyStorage
from dse.trial_record import Interval, TrialRecord

DIMENSIONS = {f"x{i}": 4 for i in range(4)}
DIRECTIONS = ("maximize", "minimize")


def record_of(proposal: Proposal, state: str = "complete", **changes: Any) -> TrialRecord:
    point = {"tensors": {name: {"method": "svd", "rank": level} for name, level in proposal.levels.items()}}
    return TrialRecord(proposal.trial, state, proposal.origin, point, f"id{proposal.trial}", "{}", **changes)


def values_of(levels: Any) -> list[float]:
    """Two objectives at odds: one wants high levels, the other low ones."""
    return [sum(levels.values()) / 12, sum(level**2 for level in levels.values()) + levels["x0"]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., StudyStorage]]:
    """Opens storages of one file, and closes them."""
    storages: list[StudyStorage] = []

    def open_(name: str = "study.db", **keywords: Any) -> StudyStorage:
        storages.append(StudyStorage.open(tmp_path / name, DIRECTIONS, **keywords))
        return storages[-1]

    yield open_
    for storage in storages:
        storage.close()


Opener = Callable[..., StudyStorage]


def test_what_is_told_is_found_again(opened: Opener, tmp_path: Path) -> None:
    storage = opened(sampler="random", seed=3)
    storage.set_attribute("objectives", ["accuracy", "parameters"])
    storage.enqueue(dict.fromkeys(DIMENSIONS, 0), "dense")
    assert storage.enqueued == 1
    proposals = [storage.ask(DIMENSIONS) for _ in range(5)]
    assert [p.trial for p in proposals] == list(range(5))
    assert [p.origin for p in proposals] == ["dense", *["sampler"] * 4]
    assert set(proposals[0].levels.values()) == {0}
    assert storage.enqueued == 0
    records = [
        record_of(proposals[0], quantities={"accuracy": Interval(0.5, 0.4, 0.6)}, accuracy_drop=Interval(0.0)),
        record_of(proposals[1], "failed", reason="NonFiniteError: nan"),
        record_of(proposals[2], "infeasible", reason="reduction_max exceeded", feasible=False),
        record_of(proposals[3], "duplicate", duplicate_of=0),
    ]
    storage.tell(records[0], [0.5, 10.0], {"reduction_max": -0.1})
    storage.tell(records[1], None, {"reduction_max": -0.1})
    storage.tell(records[2], None, {"reduction_max": 0.2})
    storage.tell(records[3], [0.5, 10.0], {"reduction_max": -0.1})
    assert storage.records() == records
    assert storage.unfinished() == [proposals[4]]
    storage.close()

    again = StudyStorage.open_existing(tmp_path / "study.db")
    assert again.records() == records
    assert again.unfinished() == [proposals[4]]
    assert again.attributes == {"objectives": ["accuracy", "parameters"], "queue": []}
    again.close()
    # An ordinary Optuna storage, for whoever wants to look with Optuna's own tools.
    database = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")
    study = optuna.load_study(study_name="dse", storage=database)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "RUNNING"]
    assert study.trials[2].constraints == {"reduction_max": 0.2}
    database.engine.dispose()


def test_the_repetition_of_a_failed_trial_has_no_values(opened: Opener) -> None:
    storage = opened()
    proposal = storage.ask(DIMENSIONS)
    storage.tell(record_of(proposal, "duplicate", duplicate_of=0, reason="it failed"), None, {})
    assert storage.records()[0].state == "duplicate"


def test_many_writes_are_one(opened: Opener) -> None:
    storage = opened()

    def write_half() -> None:
        with storage.at_once():
            storage.set_attribute("a", 1)
            storage.enqueue(dict.fromkeys(DIMENSIONS, 1), "enqueued")
            proposal = storage.ask(DIMENSIONS)
            storage.tell(record_of(proposal), [1.0, 1.0], {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    storage.close()
    fresh = opened()
    assert fresh.attributes == {}
    assert fresh.enqueued == 0
    assert fresh.records() == []
    assert fresh.unfinished() == []
    for level in (1, 2):
        fresh.enqueue(dict.fromkeys(DIMENSIONS, level), "enqueued")
    fresh.enqueue(dict.fromkeys(DIMENSIONS, 3), "retried", first=True)
    assert [fresh.ask(DIMENSIONS).levels["x0"] for _ in range(3)] == [3, 1, 2]
    with fresh.at_once(), fresh.at_once():
        fresh.set_attribute("a", 1)
    fresh.close()
    assert opened().attributes == {"queue": [], "a": 1}


KILLED = """
import os, signal, sys
from pathlib import Path
from dse.trial_record import TrialRecord
from dse.study.storage import StudyStorage
storage = StudyStorage.open(Path(sys.argv[1]), ("maximize", "minimize"), sampler="random")
dimensions = {f"x{i}": 4 for i in range(4)}
def tell(proposal):
    storage.tell(TrialRecord(proposal.trial, "complete", "sampler", {"tensors": {}}, "i", "{}"), [1.0, 2.0], {})
tell(storage.ask(dimensions))
storage.ask(dimensions)
with storage.at_once():
    tell(storage.ask(dimensions))
    storage.set_attribute("reference", 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_keeps_what_was_finished_and_nothing_half(opened: Opener, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "study.db")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    storage = opened()
    assert [record.trial for record in storage.records()] == [0]
    assert [proposal.trial for proposal in storage.unfinished()] == [1]
    assert len(storage.unfinished()[0].levels) == len(DIMENSIONS)
    assert storage.attributes == {}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_do_not_depend_on_being_resumed(opened: Opener, sampler: str) -> None:
    """A storage that is opened anew for every trial, and whose trials are at times repeated, proposes the same."""

    def search(name: str, *, stopped: bool) -> list[dict[str, int]]:
        storage = opened(name, sampler=sampler, seed=5, trials=12)
        for level in (0, 1, 2, 3, 2):
            storage.enqueue(dict.fromkeys(DIMENSIONS, level), "enqueued")
        points: list[dict[str, int]] = []
        while len(points) < 12:
            if stopped:
                storage.close()
                storage = opened(name, sampler=sampler, seed=5, trials=12)
            proposal = storage.ask(DIMENSIONS)
            if stopped and proposal.trial in (2, 9):  # as after a kill
                storage.close()
                storage = opened(name, sampler=sampler, seed=5, trials=12)
                assert storage.unfinished() == [proposal]
                storage.tell(record_of(proposal, "interrupted"), None, {})
                storage.enqueue(proposal.levels, "retried", first=True)
                continue
            storage.tell(record_of(proposal), values_of(proposal.levels), {"limit": -1.0})
            points.append(dict(proposal.levels))
        return points

    assert search("resumed.db", stopped=True) == search("whole.db", stopped=False)


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_queued_and_repaired_points_take_part_in_the_generations(opened: Opener, tmp_path: Path, sampler: str) -> None:
    """Where every proposal is infeasible and only its repair is evaluated, the algorithm must still get on."""
    storage = opened(sampler=sampler, seed=0, trials=40)
    generator = random.Random(0)
    for _ in range(30):
        proposal = storage.ask(DIMENSIONS)
        storage.tell(record_of(proposal, "infeasible"), None, {"limit": 1.0})
        storage.enqueue({name: generator.randrange(4) for name in DIMENSIONS}, "repaired")
        proposal = storage.ask(DIMENSIONS)
        assert proposal.origin == "repaired"
        storage.tell(record_of(proposal), values_of(proposal.levels), {"limit": -1.0})
    storage.close()
    database = sqlite3.connect(tmp_path / "study.db")
    keys = [row[0] for row in database.execute("select key from study_system_attributes")]
    database.close()
    # A generation is 10 of 40 trials; parents of generation n are cached when the first of its children is made.
    assert {key.rpartition(":")[2] for key in keys if ":parent:" in key} == {"1", "2"}


def test_samplers_learn(opened: Opener) -> None:
    """Model-based samplers come nearer to the good corner than random ones, or their results would not reach them."""

    def mean_cost(sampler: str) -> float:
        storage = opened(f"{sampler}.db", sampler=sampler, seed=1, trials=30)
        costs = []
        for _ in range(30):
            proposal = storage.ask(DIMENSIONS)
            cost = float(sum(proposal.levels.values()))
            storage.tell(record_of(proposal), [-cost, cost], {})
            costs.append(cost)
        return sum(costs[10:]) / 20

    assert mean_cost("tpe") < mean_cost("random") - 1


def test_a_path_may_hold_what_a_url_may_not(opened: Opener, tmp_path: Path) -> None:
    folder = tmp_path / "a?b #{x} 50% ü"
    folder.mkdir()
    storage = StudyStorage.open(folder / "study.db", DIRECTIONS)
    storage.set_attribute("a", 1)
    storage.close()
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}


def test_a_storage_that_never_began(opened: Opener, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.touch()
    assert not StudyStorage.is_begun(path)
    with pytest.raises(StudyError, match="holds a study that never started; run `dse run` again"):
        StudyStorage.open_existing(path)
    storage = opened()
    assert not StudyStorage.is_begun(path)
    storage.close()
    # Begun with other objectives by a process that was killed before it wrote anything: made anew.
    other = StudyStorage.open(path, ("minimize",))
    other.set_attribute("objectives", ["parameters"])
    other.close()
    assert StudyStorage.is_begun(path)
    with pytest.raises(StudyError, match="must be of the study's 2 objectives"):
        StudyStorage.open(path, DIRECTIONS)


def test_files_that_are_no_storage(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"must hold study\.db"):
        StudyStorage.open_existing(tmp_path / "study.db")
    with pytest.raises(StorageFullError, match="unable to open"):
        StudyStorage.open(tmp_path / "no such folder" / "study.db", DIRECTIONS)
    (tmp_path / "text.db").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(StudyError, match="not a database"):
        StudyStorage.open(tmp_path / "text.db", DIRECTIONS)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table version_info (a)")
    other.commit()
    other.close()
    with pytest.raises(StudyError):
        StudyStorage.open(tmp_path / "other.db", DIRECTIONS)


def test_a_damaged_storage_is_told_in_one_line(opened: Opener, tmp_path: Path) -> None:
    storage = opened(sampler="random")
    for _ in range(6):
        proposal = storage.ask(DIMENSIONS)
        storage.tell(record_of(proposal), [1.0, 2.0], {"limit": -1.0})
    storage.set_attribute("objectives", ["accuracy"])
    storage.close()
    whole = (tmp_path / "study.db").read_bytes()
    generator = random.Random(0)
    damaged = tmp_path / "damaged.db"
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        start = generator.randrange(len(content))
        for index in range(start, min(len(content), start + generator.choice([1, 16, 3000]))):
            content[index] = generator.randrange(256)
        damaged.write_bytes(content[: generator.choice([None, None, None, start])])
        try:
            reader = StudyStorage.open_existing(damaged)
            _ = reader.attributes, reader.records(), reader.unfinished()
            reader.close()
        except UserError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message
            assert str(damaged) in message or str(tmp_path) in message
    assert refused > 5
