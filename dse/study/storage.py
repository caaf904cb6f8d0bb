"""The study's trials in an Optuna RDB storage: what is asked, told, and found again after a kill."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState as OptunaState

from dse.errors import StorageFullError, StudyError
from dse.study.record import TrialRecord
from dse.study.sampler import make_sampler

__all__ = ["Proposal", "StudyStorage"]

_RECORD, _ORIGIN = "record", "origin"


@dataclass(frozen=True)
class Proposal:
    """A point that was asked for and has not been told yet."""

    trial: int
    levels: Mapping[str, int]
    origin: str


class StudyStorage:
    """One Optuna study in one SQLite file; the only place that talks to Optuna.

    Optuna's own states are used as its samplers read them: COMPLETE with values, PRUNED with a violated constraint
    (infeasible: learnt from, never evaluated), FAIL. What each trial really was stands in its record.
    """

    def __init__(self, study: optuna.Study, path: Path, sampler_name: str, seed: int, trials: int) -> None:
        self._study = study
        self._path = path
        self._sampler_name = sampler_name
        self._seed = seed
        self._trials = trials

    @classmethod
    def open(
        cls, path: Path, directions: Sequence[str], *, sampler: str = "tpe", seed: int = 0, trials: int = 40
    ) -> StudyStorage:
        """Create or open the storage.

        Raises:
            StorageFullError: The file cannot be written.
            StudyError: The file is damaged or not an Optuna storage.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _storage_errors(path):
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            directed = [optuna.study.StudyDirection[direction.upper()] for direction in directions]
            study = optuna.create_study(storage=storage, study_name="dse", directions=directed, load_if_exists=True)
        return cls(study, path, sampler, seed, trials)

    @classmethod
    def open_existing(cls, path: Path) -> StudyStorage:
        """Open a storage for reading.

        Raises:
            StudyError: There is none, or it is damaged.
        """
        if not path.is_file():
            raise StudyError(f"a study folder must hold {path.name}, but {path.parent} does not; run `dse run` first")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _storage_errors(path):
            study = optuna.load_study(storage=f"sqlite:///{path}", study_name="dse")
        return cls(study, path, "tpe", 0, 1)

    @property
    def attributes(self) -> dict[str, Any]:
        """Facts about the study as a whole: environment, reference point, dense trial."""
        return dict(self._study.user_attrs)

    def set_attribute(self, name: str, value: Any) -> None:
        """Keep a JSON-safe fact about the study."""
        with _storage_errors(self._path):
            self._study.set_user_attr(name, value)

    def enqueue(self, levels: Mapping[str, int], origin: str) -> None:
        """Have these levels proposed next (first in, first out)."""
        with _storage_errors(self._path):
            self._study.enqueue_trial(dict(levels), user_attrs={_ORIGIN: origin})

    @property
    def enqueued(self) -> int:
        """Proposals waiting in the queue."""
        with _storage_errors(self._path):
            return len(self._study.get_trials(deepcopy=False, states=(OptunaState.WAITING,)))

    def ask(self, dimensions: Mapping[str, int]) -> Proposal:
        """The next proposal: from the queue, else from the sampler.

        Args:
            dimensions: Dimension name to its number of levels.
        """
        with _storage_errors(self._path), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            asked = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = make_sampler(self._sampler_name, self._seed, self._trials, asked)
            trial = self._study.ask()
            levels = {name: trial.suggest_int(name, 0, size - 1) for name, size in dimensions.items()}
        return Proposal(trial.number, levels, str(trial.user_attrs.get(_ORIGIN, "sampler")))

    def tell(self, record: TrialRecord, values: Sequence[float] | None, violations: Mapping[str, float]) -> None:
        """Keep the record of a trial, then finish it; a kill in between leaves it unfinished, to be tried again.

        Args:
            record: All about the trial.
            values: Objective values in the study's order; None where it has none.
            violations: Constraint name to value, <= 0 feasible.
        """
        trial = optuna.trial.Trial(self._study, self._trial_id(record.trial))
        state = {
            "complete": OptunaState.COMPLETE,
            "duplicate": OptunaState.COMPLETE,
            "infeasible": OptunaState.PRUNED,
        }.get(record.state, OptunaState.FAIL)
        with _storage_errors(self._path):
            for name, value in violations.items():
                trial.set_constraint(name, value)
            trial.set_user_attr(_RECORD, json.dumps(record.to_json(), allow_nan=False))
            self._study.tell(record.trial, list(values) if values is not None else None, state=state)

    def records(self) -> list[TrialRecord]:
        """Records of all finished trials, by number."""
        with _storage_errors(self._path):
            trials = self._study.get_trials(deepcopy=False)
        return [
            TrialRecord.from_json(json.loads(trial.user_attrs[_RECORD]))
            for trial in trials
            if trial.state.is_finished() and _RECORD in trial.user_attrs
        ]

    def unfinished(self) -> list[Proposal]:
        """Trials that a killed process left running; call only while holding the study's lock."""
        with _storage_errors(self._path):
            running = self._study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,))
        return [Proposal(t.number, dict(t.params), str(t.user_attrs.get(_ORIGIN, "sampler"))) for t in running]

    def _trial_id(self, number: int) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn what Optuna and SQLAlchemy raise on a bad file into one clear line."""
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = " ".join(str(error.__cause__ or error).split()).split(" [SQL")[0]
        if any(word in reason for word in ("full", "readonly", "unable to open", "disk I/O")):
            raise StorageFullError(
                f"{path} must be writable and the disk have room, but: {reason}; nothing measured is lost,"
                " free some space and run the same command again"
            ) from error
        raise StudyError(f"{path} must be a study storage of dse, but: {reason}") from error
    except (KeyError, RuntimeError) as error:
        raise StudyError(f"{path} must be a study storage of dse, but: {error}") from error
