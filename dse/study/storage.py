"""The trials of a study in an Optuna storage.

A kill can fall between any two writes. Every operation here is therefore safe to repeat: a trial is finished by one
last write, and whatever a kill leaves unfinished is evaluated again under its own number when the study resumes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from dse.design_point import DesignPoint
from dse.errors import PointError, StudyError
from dse.search.proposal import Proposal
from dse.study.mirrored_storage import MirroredStorage
from dse.study.samplers import make_sampler
from dse.study.storage_connection import (
    DatabaseLostError,
    close,
    connected,
    existing_study,
    storage_errors,
    without_experimental_warnings,
)
from dse.study.storage_place import DatabasePlace
from dse.trial_record import TrialRecord

__all__ = ["RETRY_S", "StudyStorage"]

_RECORD, _ORIGIN, _WHY, _POINT = "record", "origin", "why", "point"
_REVISED = "revised"
_DASHBOARD_CONSTRAINTS = "constraints"
"""System attribute from which Optuna's samplers and optuna-dashboard read a trial's constraint values, as a list.

`Trial.set_constraint` writes one attribute per name, which optuna-dashboard 0.21 does not show; writing both would
count every violation twice. The names are kept as a user attribute.
"""

RETRY_S = 1.0
"""Seconds between two attempts to reach a database that does not answer."""

P = ParamSpec("P")
T = TypeVar("T")


def _patient(method: Callable[P, T]) -> Callable[P, T]:
    """Repeat a method of `StudyStorage` while its database does not answer.

    Every method is safe to repeat, even if the database did the work and only its answer was lost.
    """

    @functools.wraps(method)
    def repeated(*arguments: P.args, **keywords: P.kwargs) -> T:
        storage, waited_s = cast("StudyStorage", arguments[0]), 0.0
        while True:
            try:
                storage.read_again_if_broken()
                return method(*arguments, **keywords)
            except DatabaseLostError as error:
                storage.is_repeated = True
                storage.on_wait(str(error), waited_s)
                time.sleep(RETRY_S)
                waited_s += RETRY_S

    return repeated


def _ignore_wait(reason: str, waited_s: float) -> None:
    """Wait without a word."""


class StudyStorage:
    """One Optuna study in one SQLite file or database; the only class that talks to Optuna.

    A database that stops answering is waited for. `on_wait` receives the reason and the seconds waited so far; it may
    raise an error to end the wait.

    Optuna's trial states are set as its samplers read them: COMPLETE with values, PRUNED with a violated constraint
    (infeasible: the sampler learns from it), FAIL. The actual state of a trial is in its record.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.RDBStorage | MirroredStorage,
        path: Path | DatabasePlace,
    ) -> None:
        self._study = study
        self._storage = storage
        self._is_broken = False
        self._path = path
        self._sampler_name, self._seed, self._trials, self._is_parallel = "tpe", 0, 1, False
        self.on_wait: Callable[[str, float], None] = _ignore_wait
        self.is_repeated = False
        self._taken: set[int] = set()

    @classmethod
    def open(
        cls,
        path: Path | DatabasePlace,
        name: str,
        metrics: Mapping[str, str],
        *,
        sampler: str = "tpe",
        seed: int = 0,
        trials: int = 40,
        is_parallel: bool = False,
    ) -> StudyStorage:
        """Create the storage, or open an existing one.

        Args:
            path: The SQLite file, or the database.
            name: Name of the study in Optuna; an existing study keeps its own.
            metrics: Objective name to "minimize" or "maximize", in order.
            sampler: A key of `dse.study.SAMPLERS`.
            seed: The sampler's seed.
            trials: The study's budget.
            is_parallel: Whether several trials run at once, so that the sampler must keep away from running ones.

        Raises:
            StorageFullError: The file cannot be written.
            StudyError: The file is damaged, not an Optuna storage, or holds a study with other objectives.
        """
        directions = [optuna.study.StudyDirection[direction.upper()] for direction in metrics.values()]
        with connected(path) as storage:
            study = existing_study(storage, path)
            if study is not None and study.directions != directions:
                if study.user_attrs:
                    raise StudyError(
                        f"{path} must hold a study with these {len(directions)} objectives, but its objectives differ"
                    )
                optuna.delete_study(storage=storage, study_name=study.study_name)  # killed before its first trial
                study = None
            if study is None:
                own_name = path.study if isinstance(path, DatabasePlace) else name
                study = optuna.create_study(storage=storage, study_name=own_name, directions=directions)
            with without_experimental_warnings():
                study.set_metric_names(list(metrics))
            mirrored = MirroredStorage(storage, study.study_name)
            opened = cls(optuna.load_study(storage=mirrored, study_name=study.study_name), mirrored, path)
        opened._sampler_name, opened._seed, opened._trials, opened._is_parallel = sampler, seed, trials, is_parallel
        opened._adopt_old_queue()
        return opened

    def _adopt_old_queue(self) -> None:
        """Move the queue of a study of version 0.1, an attribute of the study, into Optuna's."""
        for levels, origin, why, point in ([*entry, "", None][:4] for entry in self.attributes.get("queue", [])):
            self.enqueue(Proposal(levels, origin, why, None if point is None else DesignPoint.from_stored(point)))
        if self.attributes.get("queue"):
            self.set_attribute("queue", [])

    @classmethod
    def open_existing(cls, path: Path | DatabasePlace) -> StudyStorage:
        """Open a storage for reading.

        Raises:
            StudyError: The file is missing or damaged, or holds no study.
        """
        if isinstance(path, Path) and not path.is_file():
            raise StudyError(f"a study folder must hold {path.name}, but {path.parent} does not; run `dse run` first")
        with connected(path) as storage:
            study = existing_study(storage, path)
            if study is None:
                where = path.parent if isinstance(path, Path) else path.pointer.parent
                raise StudyError(f"{where} holds a study that never started; run `dse run` again")
        return cls(study, storage, path)

    @staticmethod
    def has_started(path: Path | DatabasePlace) -> bool:
        """Whether the file holds a study whose objectives are known; a kill can come before that.

        Raises:
            StudyError: The file is damaged.
        """
        with connected(path) as storage:
            study = existing_study(storage, path)
            started = study is not None and "objectives" in study.user_attrs
        close(storage)
        return started

    def close(self) -> None:
        """Close the file; the storage cannot be used afterwards."""
        close(self._database)

    @property
    def _database(self) -> optuna.storages.RDBStorage:
        return self._storage.database if isinstance(self._storage, MirroredStorage) else self._storage

    def read_again_if_broken(self) -> None:
        """Read the study again if a write was cut short, so that memory and database may differ."""
        if self._is_broken:
            with storage_errors(self._path):
                name = self._study.study_name
                self._storage = MirroredStorage(self._database, name)
                self._study = optuna.load_study(storage=self._storage, study_name=name)
            self._is_broken = False

    @property
    @_patient
    def attributes(self) -> dict[str, Any]:
        """Attributes of the whole study: objectives, environment, reference point."""
        with storage_errors(self._path):
            return dict(self._study.user_attrs)

    @_patient
    def set_attribute(self, name: str, value: Any) -> None:
        """Store a JSON-safe attribute of the whole study."""
        with self._writing():
            self._study.set_user_attr(name, value)

    @_patient
    def enqueue(self, proposal: Proposal) -> None:
        """Append a proposal to Optuna's queue."""
        if self._was_repeated() and self.is_enqueued(proposal):
            return
        attributes: dict[str, Any] = {_ORIGIN: proposal.origin, **({_WHY: proposal.why} if proposal.why else {})}
        if proposal.point is not None:
            attributes[_POINT] = proposal.point.to_json()
        with self._writing():
            self._study.enqueue_trial(dict(proposal.levels), user_attrs=attributes)

    @property
    @_patient
    def enqueued(self) -> int:
        """Number of proposals waiting in the queue."""
        return len(self._in_state(TrialState.WAITING))

    @_patient
    def is_enqueued(self, proposal: Proposal) -> bool:
        """Whether the same levels and point are waiting in the queue."""
        waiting = (self._proposal(trial) for trial in self._in_state(TrialState.WAITING))
        return any(other.levels == proposal.levels and other.point == proposal.point for other in waiting)

    @_patient
    def ask(self, dimensions: Mapping[str, int]) -> Proposal:
        """The next proposal, from the queue or, if it is empty, from the sampler.

        Args:
            dimensions: Dimension name to its number of levels.
        """
        if self._was_repeated() and (lost := self._unfinished(dimensions, without=self._taken)):
            return lost[0]  # the database had given it out, and its answer was lost
        with self._writing(), without_experimental_warnings():
            # Only the sampler's own proposals count, so that queued points do not shift its seeds.
            asked = sum(_ORIGIN not in trial.user_attrs and not _is_abandoned(trial) for trial in self._in_state())
            self._study.sampler = make_sampler(
                self._sampler_name, self._seed, self._trials, asked, is_parallel=self._is_parallel
            )
            trial = self._study.ask()
            if self._sampler_name.startswith("nsga"):
                # Assigns queued points to a generation, too. Optuna leaves them out, and with them every repaired
                # point, so that in a space with limits no generation would ever be complete.
                _ = trial.relative_params
            return self._suggested(trial, dimensions)

    @_patient
    def unfinished(self, dimensions: Mapping[str, int]) -> list[Proposal]:
        """Proposals whose trials a stopped process left running; call only while holding the study's lock.

        A sampler's proposal of which some parameters were not stored yet is abandoned: drawing the rest now would give
        another point than the undisturbed study's.
        """
        return self._unfinished(dimensions, without=set())

    def _unfinished(self, dimensions: Mapping[str, int], without: set[int]) -> list[Proposal]:
        found = []
        with self._writing(), without_experimental_warnings():
            for frozen in self._in_state(TrialState.RUNNING):
                if frozen.number in without:
                    continue
                if _ORIGIN not in frozen.user_attrs and len(frozen.params) < len(dimensions):
                    self._study.tell(frozen.number, state=TrialState.FAIL)
                else:
                    found.append(self._suggested(self._trial(frozen.number), dimensions))
        return found

    def _suggested(self, trial: Trial, dimensions: Mapping[str, int]) -> Proposal:
        for name, size in dimensions.items():
            trial.suggest_int(name, 0, size - 1)
        self._taken.add(trial.number)
        return self._proposal(self._storage.get_trial(self._trial_id(trial.number)))

    @_patient
    def set_point(self, proposal: Proposal) -> None:
        """Store the design point of a proposed trial whose levels may later stand for another point."""
        if proposal.trial is None or proposal.point is None:
            raise ValueError("a proposal must have its trial and its point before they are stored")
        with self._writing():
            self._trial(proposal.trial).set_user_attr(_POINT, proposal.point.to_json())

    @_patient
    def finish(self, record: TrialRecord, values: Sequence[float] | None, violations: Mapping[str, float]) -> None:
        """Store the record of a trial and finish the trial.

        Args:
            record: The trial's record.
            values: Objective values in the study's order; None for a trial without values.
            violations: Constraint name to its value; <= 0 is feasible.
        """
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL
        if record.state == "infeasible" or (values is None and any(value > 0 for value in violations.values())):
            state = TrialState.PRUNED
        with self._writing():
            if self._was_repeated() and self._storage.get_trial(self._trial_id(record.trial)).state.is_finished():
                return
            trial_id = self._trial_id(record.trial)
            if violations:
                self._storage.set_trial_system_attr(trial_id, _DASHBOARD_CONSTRAINTS, list(violations.values()))
                self._storage.set_trial_user_attr(trial_id, _DASHBOARD_CONSTRAINTS, dict(violations))
            self._storage.set_trial_user_attr(trial_id, _RECORD, json.dumps(record.to_json(), allow_nan=False))
            self._study.tell(record.trial, None if values is None else list(values), state=state)

    @_patient
    def revise(self, record: TrialRecord) -> None:
        """Replace the record of a finished trial; Optuna, which cannot change a finished trial, keeps its values."""
        self.set_attribute(_REVISED, {**self.attributes.get(_REVISED, {}), str(record.trial): record.to_json()})

    @_patient
    def records(self, known: Mapping[int, TrialRecord] | None = None) -> list[TrialRecord]:
        """Records of all finished trials, by number.

        Args:
            known: Records by trial number that were read before, and are not read again unless they were revised.

        Raises:
            StudyError: A record cannot be read.
        """
        finished = [trial for trial in self._in_state() if trial.state.is_finished() and not _is_abandoned(trial)]
        revised, known = self.attributes.get(_REVISED, {}), known or {}
        try:
            return [
                known[trial.number]
                if trial.number in known and str(trial.number) not in revised
                else TrialRecord.from_json(revised.get(str(trial.number)) or json.loads(trial.user_attrs[_RECORD]))
                for trial in finished
            ]
        except (KeyError, TypeError, ValueError, AttributeError, PointError) as error:
            raise StudyError(f"{self._path} must hold a record of every trial, but one is damaged: {error}") from error

    def pending(self) -> list[tuple[Proposal, float | None]]:
        """Running trials with their start in seconds since the epoch, then waiting ones with None."""
        running, waiting = self._in_state(TrialState.RUNNING), self._in_state(TrialState.WAITING)
        starts = [None if trial.datetime_start is None else trial.datetime_start.timestamp() for trial in running]
        proposals = [self._proposal(trial) for trial in (*running, *waiting)]
        return list(zip(proposals, starts + [None] * len(waiting), strict=True))

    def _in_state(self, *states: TrialState) -> list[FrozenTrial]:
        with storage_errors(self._path):
            return self._study.get_trials(deepcopy=False, states=states or None)

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        """The proposal behind a waiting or running trial."""
        attributes = trial.user_attrs
        point, levels = attributes.get(_POINT), trial.params or trial.system_attrs.get("fixed_params", {})
        return Proposal(
            levels=dict(levels),
            origin=str(attributes.get(_ORIGIN, "sampler")),
            why=str(attributes.get(_WHY, "")),
            point=None if point is None else DesignPoint.from_stored(point),
            trial=trial.number,
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Make one transaction of all writes of the block. If it is cut short, the study is read again."""
        storage = self._storage
        together = storage.one_write() if isinstance(storage, MirroredStorage) else contextlib.nullcontext()
        try:
            with storage_errors(self._path), together:
                yield
        except BaseException:
            self._is_broken = True
            raise

    def _was_repeated(self) -> bool:
        """Whether the database failed since the last question, so that it may have done what is repeated now."""
        was_repeated, self.is_repeated = self.is_repeated, False
        return was_repeated

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)


def _is_abandoned(trial: FrozenTrial) -> bool:
    """Whether a kill cut the proposal of this trial short."""
    return trial.state == TrialState.FAIL and _RECORD not in trial.user_attrs
