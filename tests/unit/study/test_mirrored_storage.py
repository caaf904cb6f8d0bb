"""The study in memory and in its database: equal after every block, and a block that is cut short changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from dse.study.mirrored_storage import MirroredStorage
from dse.study.storage_connection import close, connected, existing_study


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[MirroredStorage, optuna.Study]]:
    with connected(path) as database:
        if existing_study(database, path) is None:
            optuna.create_study(storage=database, study_name="own", directions=["maximize", "minimize"])
        mirrored = MirroredStorage(database, "own")
        yield mirrored, optuna.load_study(storage=mirrored, study_name="own")
    close(database)


def on_disk(path: Path) -> list[FrozenTrial]:
    """The trials as another process reads them."""
    with connected(path) as database:
        study = existing_study(database, path)
        assert study is not None
        trials = study.get_trials()
    close(database)
    return trials


def facts(trials: list[FrozenTrial]) -> list[tuple[object, ...]]:
    return [(t.number, t.state, t.values, t.params, t.user_attrs, t.system_attrs) for t in trials]


def evaluate(mirrored: MirroredStorage, study: optuna.Study, index: int) -> None:
    with mirrored.one_write():
        trial = study.ask()
        trial.suggest_int("level", 0, 9)
        trial.set_user_attr("origin", "sampler")
    with mirrored.one_write():
        trial.set_user_attr("record", f"{index}")
        study.tell(trial.number, [float(index), 1.0])


def test_database_and_memory_agree_now_and_when_read_again(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with opened(path) as (mirrored, study):
        for index in range(3):
            evaluate(mirrored, study, index)
        study.enqueue_trial({"level": 4}, user_attrs={"origin": "user"})
        study.set_user_attr("facts", {"a": 1})
        seen = facts(study.get_trials())
        assert seen == facts(on_disk(path))
    with opened(path) as (mirrored, study):
        assert facts(study.get_trials()) == seen
        assert study.user_attrs == {"facts": {"a": 1}}
        assert study.ask().params == {}  # the queued trial is taken, and its level is suggested next
        assert study.get_trials()[3].state == TrialState.RUNNING
        assert facts(on_disk(path)) == facts(study.get_trials())


def test_another_process_sees_a_block_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with opened(path) as (mirrored, study):
        with mirrored.one_write():
            trial = study.ask()
            trial.suggest_int("level", 0, 9)
            assert on_disk(path) == []
        (found,) = on_disk(path)
        assert found.params == trial.params
        with mirrored.one_write():
            study.tell(trial.number, [0.5, 1.0])
            assert on_disk(path)[0].state == TrialState.RUNNING
        assert on_disk(path)[0].values == [0.5, 1.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_is_cut_short_changes_nothing_in_the_database(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "study.db"
    with opened(path) as (mirrored, study):
        evaluate(mirrored, study, 0)
        before = facts(on_disk(path))
        trial = study.ask()

        def write_half() -> None:
            with mirrored.one_write():
                trial.set_user_attr("record", "half")
                study.enqueue_trial({"level": 1})
                raise error

        with pytest.raises(error):
            write_half()
        assert facts(on_disk(path))[:1] == before
        assert [t.user_attrs for t in on_disk(path)] == [before[0][4], {}]
        again = MirroredStorage(mirrored.database, "own")
        assert facts(optuna.load_study(storage=again, study_name="own").get_trials()) == facts(on_disk(path))
