"""The storage of a study: proposals and records survive kills, resuming, and damaged files."""

from __future__ import annotations

import dataclasses
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

from dse.design_point import DesignPoint, TensorChoice
from dse.errors import StorageFullError, StudyError, UserError
from dse.evaluation.statistics.intervals import Interval
from dse.search.proposal import Proposal
from dse.study import SAMPLERS
from dse.study.storage import StudyStorage
from dse.trial_record import TrialRecord

DIMENSIONS = {f"x{i}": 4 for i in range(4)}
METRICS = {"accuracy": "maximize", "parameters": "minimize"}


def record_of(proposal: Proposal, state: str = "complete", **changes: Any) -> TrialRecord:
    choices = {name: TensorChoice("svd", level) for name, level in proposal.levels.items() if level}
    return TrialRecord(proposal.trial or 0, state, proposal.origin, DesignPoint.of(choices), "{}", **changes)


def values_of(levels: Any) -> list[float]:
    """Two objectives at odds: one wants high levels, the other low ones."""
    return [sum(levels.values()) / 12, sum(level**2 for level in levels.values()) + levels["x0"]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., StudyStorage]]:
    """Opens storages of one file, and closes them."""
    storages: list[StudyStorage] = []

    def open_(name: str = "study.db", **keywords: Any) -> StudyStorage:
        storages.append(StudyStorage.open(tmp_path / name, "test", METRICS, **keywords))
        return storages[-1]

    yield open_
    for storage in storages:
        storage.close()


Opener = Callable[..., StudyStorage]


def test_stored_trials_are_found_again(opened: Opener, tmp_path: Path) -> None:
    storage = opened(sampler="random", seed=3)
    storage.set_attribute("objectives", ["accuracy", "parameters"])
    storage.enqueue(Proposal(dict.fromkeys(DIMENSIONS, 0), "dense"))
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
    storage.finish(records[0], [0.5, 10.0], {"reduction_max": -0.1})
    storage.finish(records[1], None, {"reduction_max": -0.1})
    storage.finish(records[2], None, {"reduction_max": 0.2})
    storage.finish(records[3], [0.5, 10.0], {"reduction_max": -0.1})
    assert storage.records() == records
    assert storage.unfinished(DIMENSIONS) == [proposals[4]]
    storage.close()

    again = StudyStorage.open_existing(tmp_path / "study.db")
    assert again.records() == records
    assert again.unfinished(DIMENSIONS) == [proposals[4]]
    assert again.attributes == {"objectives": ["accuracy", "parameters"]}
    again.close()
    # An ordinary Optuna storage, named after the study, for Optuna's own tools and optuna-dashboard.
    database = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")
    study = optuna.load_study(study_name="test", storage=database)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "RUNNING"]
    assert study.metric_names == ["accuracy", "parameters"]
    assert list(study.trials[2].constraints.values()) == [0.2]
    assert study.trials[2].system_attrs["constraints"] == [0.2]  # read by optuna-dashboard
    assert study.trials[2].user_attrs["constraints"] == {"reduction_max": 0.2}
    database.engine.dispose()


def test_a_duplicate_of_a_failed_trial_has_no_values(opened: Opener) -> None:
    storage = opened()
    proposal = storage.ask(DIMENSIONS)
    storage.finish(record_of(proposal, "duplicate", duplicate_of=0, reason="it failed"), None, {})
    assert storage.records()[0].state == "duplicate"


def test_the_queue_keeps_its_order_and_knows_what_waits(opened: Opener) -> None:
    storage = opened()
    points = [Proposal(dict.fromkeys(DIMENSIONS, level), "enqueued", why=f"level {level}") for level in (3, 1)]
    beside = dataclasses.replace(points[0], point=DesignPoint.of({"a": TensorChoice("svd", 7)}))
    for proposal in (*points, beside):
        assert not storage.is_enqueued(proposal)
        storage.enqueue(proposal)
        assert storage.is_enqueued(proposal)
    storage.close()
    storage = opened()
    assert storage.enqueued == 3
    assert [dataclasses.replace(storage.ask(DIMENSIONS), trial=None) for _ in range(3)] == [*points, beside]


def test_the_queue_of_an_older_study_is_adopted(opened: Opener, tmp_path: Path) -> None:
    storage = opened()
    levels = dict.fromkeys(DIMENSIONS, 2)
    point = {"tensors": {"a": {"method": "svd", "rank": 7}}}
    storage.set_attribute("queue", [[levels, "ladder"], [levels, "enqueued", "because", point]])
    storage.close()
    storage = opened()
    assert storage.ask(DIMENSIONS) == Proposal(levels, "ladder", trial=0)
    assert storage.ask(DIMENSIONS) == Proposal(
        levels, "enqueued", "because", DesignPoint.of({"a": TensorChoice("svd", 7)}), trial=1
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from dse.design_point import DesignPoint
from dse.search.proposal import Proposal
from dse.study.storage import StudyStorage
from dse.trial_record import TrialRecord
metrics = {"accuracy": "maximize", "parameters": "minimize"}
storage = StudyStorage.open(Path(sys.argv[1]), "test", metrics, sampler="random")
dimensions = {f"x{i}": 4 for i in range(4)}
first = storage.ask(dimensions)
storage.finish(TrialRecord(first.trial, "complete", "sampler", DesignPoint.dense(), "{}"), [1.0, 2.0], {})
storage.ask(dimensions)
if sys.argv[2] == "queued":
    storage.enqueue(Proposal(dict.fromkeys(dimensions, 2), "enqueued"))
import optuna.trial
suggest = optuna.trial.Trial.suggest_int
def suggest_until_killed(self, name, low, high):
    if name == "x2":
        os.kill(os.getpid(), signal.SIGKILL)
    return suggest(self, name, low, high)
optuna.trial.Trial.suggest_int = suggest_until_killed
storage.ask(dimensions)
"""


@pytest.mark.parametrize("origin", ["sampler", "queued"])
def test_a_kill_keeps_finished_trials_and_half_a_proposal_leaves_nothing(
    opened: Opener, tmp_path: Path, origin: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "study.db"), origin]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    storage = opened(sampler="random")
    assert [record.trial for record in storage.records()] == [0]
    assert [proposal.trial for proposal in storage.unfinished(DIMENSIONS)] == [1]
    assert storage.enqueued == (origin == "queued")
    if origin == "queued":
        assert set(storage.ask(DIMENSIONS).levels.values()) == {2}
    # The proposal after the kill is the one that the kill cut short.
    undisturbed = opened("undisturbed.db", sampler="random")
    expected = [undisturbed.ask(DIMENSIONS).levels for _ in range(3)]
    if origin == "sampler":
        assert storage.ask(DIMENSIONS).levels == expected[2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_do_not_depend_on_being_resumed(opened: Opener, sampler: str) -> None:
    """A storage that is reopened for every trial, some of which are interrupted, gives the same proposals."""

    def search(name: str, *, stopped: bool) -> list[dict[str, int]]:
        storage = opened(name, sampler=sampler, seed=5, trials=12)
        for level in (0, 1, 2, 3, 2):
            storage.enqueue(Proposal(dict.fromkeys(DIMENSIONS, level), "enqueued"))
        points: list[dict[str, int]] = []
        while len(points) < 12:
            if stopped:
                storage.close()
                storage = opened(name, sampler=sampler, seed=5, trials=12)
            proposal = storage.ask(DIMENSIONS)
            if stopped and proposal.trial in (2, 9):  # killed during this trial
                storage.close()
                storage = opened(name, sampler=sampler, seed=5, trials=12)
                assert storage.unfinished(DIMENSIONS) == [proposal]
            storage.finish(record_of(proposal), values_of(proposal.levels), {"limit": -1.0})
            points.append(dict(proposal.levels))
        return points

    assert search("resumed.db", stopped=True) == search("whole.db", stopped=False)


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_queued_and_repaired_points_join_the_generations(opened: Opener, tmp_path: Path, sampler: str) -> None:
    """The algorithm must make progress even if every proposal is infeasible and only its repair is evaluated."""
    storage = opened(sampler=sampler, seed=0, trials=40)
    generator = random.Random(0)
    for _ in range(30):
        proposal = storage.ask(DIMENSIONS)
        storage.finish(record_of(proposal, "infeasible"), None, {"limit": 1.0})
        storage.enqueue(Proposal({name: generator.randrange(4) for name in DIMENSIONS}, "repaired"))
        proposal = storage.ask(DIMENSIONS)
        assert proposal.origin == "repaired"
        storage.finish(record_of(proposal), values_of(proposal.levels), {"limit": -1.0})
    storage.close()
    database = sqlite3.connect(tmp_path / "study.db")
    keys = [row[0] for row in database.execute("select key from study_system_attributes")]
    database.close()
    # A generation is 10 of 40 trials; parents of generation n are cached when the first of its children is made.
    assert {key.rpartition(":")[2] for key in keys if ":parent:" in key} == {"1", "2"}


def test_samplers_learn(opened: Opener) -> None:
    """A model-based sampler that receives results gets nearer to the good corner than a random one."""

    def mean_cost(sampler: str) -> float:
        storage = opened(f"{sampler}.db", sampler=sampler, seed=1, trials=30)
        costs = []
        for _ in range(30):
            proposal = storage.ask(DIMENSIONS)
            cost = float(sum(proposal.levels.values()))
            storage.finish(record_of(proposal), [-cost, cost], {})
            costs.append(cost)
        return sum(costs[10:]) / 20

    assert mean_cost("tpe") < mean_cost("random") - 1


def test_a_path_with_characters_that_a_url_reserves(opened: Opener, tmp_path: Path) -> None:
    folder = tmp_path / "a?b #{x} 50% ü"
    folder.mkdir()
    storage = StudyStorage.open(folder / "study.db", "test", METRICS)
    storage.set_attribute("a", 1)
    storage.close()
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}


def test_a_storage_without_a_started_study(opened: Opener, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.touch()
    assert not StudyStorage.has_started(path)
    with pytest.raises(StudyError, match="holds a study that never started; run `dse run` again"):
        StudyStorage.open_existing(path)
    storage = opened()
    assert not StudyStorage.has_started(path)
    storage.close()
    # Created with other objectives by a process that was killed before it wrote anything: replaced.
    other = StudyStorage.open(path, "test", {"parameters": "minimize"})
    other.set_attribute("objectives", ["parameters"])
    other.close()
    assert StudyStorage.has_started(path)
    with pytest.raises(StudyError, match="with these 2 objectives"):
        StudyStorage.open(path, "test", METRICS)


def test_files_that_are_not_a_storage(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"must hold study\.db"):
        StudyStorage.open_existing(tmp_path / "study.db")
    with pytest.raises(StorageFullError, match="unable to open"):
        StudyStorage.open(tmp_path / "no such folder" / "study.db", "test", METRICS)
    (tmp_path / "text.db").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(StudyError, match="not a database"):
        StudyStorage.open(tmp_path / "text.db", "test", METRICS)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table version_info (a)")
    other.commit()
    other.close()
    with pytest.raises(StudyError):
        StudyStorage.open(tmp_path / "other.db", "test", METRICS)


def test_a_damaged_storage_is_reported_in_one_line(opened: Opener, tmp_path: Path) -> None:
    storage = opened(sampler="random")
    for _ in range(6):
        proposal = storage.ask(DIMENSIONS)
        storage.finish(record_of(proposal), [1.0, 2.0], {"limit": -1.0})
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
            _ = reader.attributes, reader.records(), reader.unfinished(DIMENSIONS)
            reader.close()
        except UserError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message
            assert str(damaged) in message or str(tmp_path) in message
    assert refused > 5
