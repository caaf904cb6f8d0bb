"""The study's trials in an Optuna storage: what is asked, told, and found again after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.trial import TrialState as OptunaState

from dse.errors import StorageFullError, StudyError
from dse.study.sampler import make_sampler
from dse.study.sqlite import SqliteStorage
from dse.trial_record import TrialRecord

__all__ = ["Proposal", "StudyStorage"]

_NAME, _RECORD, _ORIGIN, _QUEUE, _WHY, _POINT = "dse", "record", "origin", "queue", "why", "point"
_REVISED = "revised"
_NO_ROOM = ("full", "readonly", "unable to open", "disk I/O")


@dataclass(frozen=True)
class Proposal:
    """A point that was asked for and has not been told yet.

    Attributes:
        trial: Number of the trial.
        levels: Its levels; where `point` is given, the nearest ones, which is what the sampler learns from.
        origin: Who proposed it.
        why: Why, in words.
        point: The design point, expanded JSON, where the levels alone do not say it.
    """

    trial: int
    levels: Mapping[str, int]
    origin: str
    why: str = ""
    point: Mapping[str, Any] | None = None


class StudyStorage:
    """One Optuna study in one SQLite file; the only place that talks to Optuna.

    Optuna's own states are used as its samplers read them: COMPLETE with values, PRUNED with a violated constraint
    (infeasible: learnt from, never evaluated), FAIL. What each trial really was stands in its record.
    """

    def __init__(self, study: optuna.Study, file: SqliteStorage, path: Path) -> None:
        self._study = study
        self._file = file
        self._path = path
        self._sampler_name, self._seed, self._trials = "tpe", 0, 1

    @classmethod
    def open(
        cls, path: Path, directions: Sequence[str], *, sampler: str = "tpe", seed: int = 0, trials: int = 40
    ) -> StudyStorage:
        """Create or open the storage.

        Args:
            path: The SQLite file.
            directions: "minimize" or "maximize" for each objective.
            sampler: A key of `dse.study.SAMPLERS`.
            seed: Of the sampler.
            trials: Budget of the study.

        Raises:
            StorageFullError: The file cannot be written.
            StudyError: The file is damaged, not an Optuna storage, or has other objectives.
        """
        directed = [optuna.study.StudyDirection[direction.upper()] for direction in directions]
        with _opened(path) as file:
            if _NAME not in optuna.get_all_study_names(file.optuna):
                optuna.create_study(storage=file.optuna, study_name=_NAME, directions=directed)
            study = optuna.load_study(storage=file.optuna, study_name=_NAME)
            if study.directions != directed and not study.user_attrs:  # killed before it began, with other objectives
                optuna.delete_study(storage=file.optuna, study_name=_NAME)
                study = optuna.create_study(storage=file.optuna, study_name=_NAME, directions=directed)
            if study.directions != directed:
                raise StudyError(f"{path} must be of the study's {len(directed)} objectives, but is of others")
        opened = cls(study, file, path)
        opened._sampler_name, opened._seed, opened._trials = sampler, seed, trials
        return opened

    @classmethod
    def open_existing(cls, path: Path) -> StudyStorage:
        """Open a storage for reading.

        Raises:
            StudyError: There is none, or it is damaged.
        """
        if not path.is_file():
            raise StudyError(f"a study folder must hold {path.name}, but {path.parent} does not; run `dse run` first")
        with _opened(path) as file:
            if _NAME not in optuna.get_all_study_names(file.optuna):
                raise StudyError(f"{path.parent} holds a study that never started; run `dse run` again")
            study = optuna.load_study(storage=file.optuna, study_name=_NAME)
        return cls(study, file, path)

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether the file holds a study that has got as far as its objectives; a kill may come before.

        Raises:
            StudyError: The file is damaged.
        """
        with _opened(path) as file:
            has_study = _NAME in optuna.get_all_study_names(file.optuna)
            begun = has_study and "objectives" in optuna.load_study(storage=file.optuna, study_name=_NAME).user_attrs
        file.close()
        return begun

    def close(self) -> None:
        """Close the file; nothing can be asked of this storage after."""
        self._file.close()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Keep all that is written under this block, or, if it raises or the process dies, nothing of it."""
        with _storage_errors(self._path), self._file.at_once():
            yield

    @property
    def attributes(self) -> dict[str, Any]:
        """Facts about the study as a whole: objectives, environment, reference point."""
        with _storage_errors(self._path):
            return dict(self._study.user_attrs)

    def set_attribute(self, name: str, value: Any) -> None:
        """Keep a JSON-safe fact about the study."""
        with _storage_errors(self._path):
            self._study.set_user_attr(name, value)

    def enqueue(
        self,
        levels: Mapping[str, int],
        origin: str,
        *,
        first: bool = False,
        why: str = "",
        point: Mapping[str, Any] | None = None,
    ) -> None:
        """Have these levels (or this point beside them) proposed after all that are queued already, or before them.

        The queue is an attribute of the study. Optuna's own would give a repeated trial its turn only after all others,
        and samplers that heed the order of trials would propose other points than without the interruption.
        """
        entry = [dict(levels), origin, why, None if point is None else dict(point)]
        with self.at_once():
            self.set_attribute(_QUEUE, [entry, *self._queue] if first else [*self._queue, entry])

    @property
    def enqueued(self) -> int:
        """Proposals waiting in the queue."""
        return len(self._queue)

    def is_enqueued(self, levels: Mapping[str, int], point: Mapping[str, Any] | None = None) -> bool:
        """Whether these levels, or this point beside them, wait in the queue."""
        return any(entry[0] == dict(levels) and [*entry, None][3] == point for entry in self._queue)

    @property
    def _queue(self) -> list[Any]:
        return list(self.attributes.get(_QUEUE, []))

    def ask(self, dimensions: Mapping[str, int]) -> Proposal:
        """The next proposal: from the queue, else from the sampler.

        Args:
            dimensions: Dimension name to its number of levels.
        """
        with self.at_once(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Only the sampler's own proposals count: one that was interrupted and queued again must not shift the rest.
            asked = sum(_ORIGIN not in trial.user_attrs for trial in self._in_state())
            self._study.sampler = make_sampler(self._sampler_name, self._seed, self._trials, asked)
            if queue := self._queue:
                levels, origin, why, point = [*queue.pop(0), "", None][:4]  # two of an older version
                extra = ({_WHY: why} if why else {}) | ({_POINT: point} if point is not None else {})
                self._study.enqueue_trial(levels, user_attrs={_ORIGIN: origin, **extra})
                self.set_attribute(_QUEUE, queue)
            trial = self._study.ask()
            if self._sampler_name.startswith("nsga"):
                # Counts a queued point into the generation, too; Optuna leaves those out, and with them every repaired
                # point, so that in a space with limits no generation would ever fill.
                _ = trial.relative_params
            levels = {name: trial.suggest_int(name, 0, size - 1) for name, size in dimensions.items()}
        return _proposal(trial.number, levels, trial.user_attrs)

    def decide(self, proposal: Proposal, point: Mapping[str, Any]) -> Proposal:
        """Keep which point a proposal's levels stand for, where that may be another one later."""
        with self.at_once():
            optuna.trial.Trial(self._study, self._trial_id(proposal.trial)).set_user_attr(_POINT, dict(point))
        return dataclasses.replace(proposal, point=point)

    def tell(self, record: TrialRecord, values: Sequence[float] | None, violations: Mapping[str, float]) -> None:
        """Keep the record of a trial and finish it; a kill leaves it unfinished, to be tried again.

        Args:
            record: All about the trial.
            values: Objective values in the study's order; None where it has none.
            violations: Constraint name to value, <= 0 feasible.
        """
        state = OptunaState.COMPLETE if values is not None else OptunaState.FAIL
        if record.state == "infeasible" or (values is None and any(value > 0 for value in violations.values())):
            state = OptunaState.PRUNED
        with self.at_once():
            trial = optuna.trial.Trial(self._study, self._trial_id(record.trial))
            for name, value in violations.items():
                trial.set_constraint(name, value)
            trial.set_user_attr(_RECORD, json.dumps(record.to_json(), allow_nan=False))
            self._study.tell(record.trial, list(values) if values is not None else None, state=state)

    def revise(self, record: TrialRecord) -> None:
        """Keep another record of a trial that is finished; Optuna, which lets no trial be changed, keeps its values."""
        with self.at_once():
            self.set_attribute(_REVISED, {**self.attributes.get(_REVISED, {}), str(record.trial): record.to_json()})

    def records(self) -> list[TrialRecord]:
        """Records of all finished trials, by number.

        Raises:
            StudyError: A record cannot be read.
        """
        finished = [trial for trial in self._in_state() if trial.state.is_finished()]
        revised = self.attributes.get(_REVISED, {})
        try:
            return [
                TrialRecord.from_json(revised.get(str(trial.number)) or json.loads(trial.user_attrs[_RECORD]))
                for trial in finished
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StudyError(f"{self._path} must hold a record of every trial, but one is damaged: {error}") from error

    def unfinished(self) -> list[Proposal]:
        """Trials that a killed process left running; call only while holding the study's lock."""
        running = self._in_state(OptunaState.RUNNING)
        return [_proposal(t.number, t.params, t.user_attrs) for t in running]

    def _in_state(self, *states: OptunaState) -> list[optuna.trial.FrozenTrial]:
        with _storage_errors(self._path):
            return self._study.get_trials(deepcopy=False, states=states or None)

    def _trial_id(self, number: int) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


def _proposal(trial: int, levels: Mapping[str, int], attributes: Mapping[str, Any]) -> Proposal:
    origin = str(attributes.get(_ORIGIN, "sampler"))
    return Proposal(trial, dict(levels), origin, str(attributes.get(_WHY, "")), attributes.get(_POINT))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[SqliteStorage]:
    """The file, closed again if the block raises."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _storage_errors(path):
        file = SqliteStorage(path)
        try:
            yield file
        except (KeyError, RuntimeError) as error:  # tables or a version that this Optuna does not know
            file.close()
            raise StudyError(f"{path} must be a study storage of dse, but: {error}") from error
        except BaseException:
            file.close()
            raise


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite, SQLAlchemy and Optuna raise on a bad file or disk into one clear line."""
    try:
        yield
    except (
        optuna.exceptions.StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        sqlite3.Error,
        json.JSONDecodeError,  # an attribute that is no JSON any more
    ) as error:
        reason = " ".join(str(error.__cause__ or error).split()).split(" [SQL")[0]
        if any(word in reason for word in _NO_ROOM):
            raise StorageFullError(
                f"{path} must be writable and the disk have room, but: {reason}; nothing measured is lost,"
                " free some space and run the same command again"
            ) from error
        raise StudyError(f"{path} must be a study storage of dse, but: {reason}") from error
