"""A study in memory and in a database: reads cost nothing, and every change is first written to the database."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from dse.study.storage_connection import one_transaction

__all__ = ["MirroredStorage"]


class MirroredStorage(optuna.storages.InMemoryStorage):
    """One study of a database, for the only process that writes it.

    Optuna reads all unfinished trials from a database several times per trial, which takes longer the more of them are
    in flight. Here they are read once.

    Args:
        database: The database.
        name: Name of the study, which exists there.
    """

    def __init__(self, database: optuna.storages.RDBStorage, name: str) -> None:
        super().__init__()
        self.database, self._there = database, database.get_study_id_from_name(name)
        self._ids: dict[int, int] = {}
        self._new: list[int] = []
        self._is_collecting = False
        self._unfinished: set[int] = set()
        here = super().create_new_study(database.get_study_directions(self._there), name)
        for key, value in database.get_study_user_attrs(self._there).items():
            super().set_study_user_attr(here, key, value)
        for key, value in database.get_study_system_attrs(self._there).items():
            super().set_study_system_attr(here, key, value)
        for trial in sorted(database.get_all_trials(self._there, deepcopy=False), key=lambda trial: trial.number):
            self._create(here, trial)

    @contextlib.contextmanager
    def one_write(self) -> Iterator[None]:
        """Write all changes of a block at once, a new trial with everything that the block has set."""
        self._is_collecting = True
        try:
            with one_transaction(self.database):
                yield
                self._is_collecting = False
                while self._new:
                    trial_id = self._new.pop(0)
                    self._ids[trial_id] = self.database.create_new_trial(self._there, self.get_trial(trial_id))
        finally:
            self._is_collecting = False
            self._new.clear()

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write an attribute of the study."""
        self.database.set_study_user_attr(self._there, key, value)
        super().set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write an attribute of the study."""
        self.database.set_study_system_attr(self._there, key, value)
        super().set_study_system_attr(study_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Write a trial; inside `one_write`, at the end of the block."""
        if self._is_collecting:
            trial_id = self._create(study_id, template_trial)
            self._new.append(trial_id)
            return trial_id
        there = self.database.create_new_trial(self._there, template_trial)
        trial_id = self._create(study_id, template_trial)
        self._ids[trial_id] = there
        return trial_id

    def _create(self, study_id: int, trial: FrozenTrial | None) -> int:
        trial_id = super().create_new_trial(study_id, trial)
        if trial is None or not trial.state.is_finished():
            self._unfinished.add(trial_id)
        return trial_id

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Trials in these states, or all, by number."""
        if states is None or any(state in states for state in TrialState if state.is_finished()):
            return super().get_all_trials(study_id, deepcopy, states)
        found = [self.get_trial(trial_id) for trial_id in sorted(self._unfinished)]
        found = [trial for trial in found if trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Write a parameter of a trial."""
        if trial_id not in self._new:
            self.database.set_trial_param(self._id(trial_id), param_name, param_value_internal, distribution)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Write state and values of a trial."""
        if trial_id not in self._new and not self.database.set_trial_state_values(self._id(trial_id), state, values):
            return False
        if state.is_finished():
            self._unfinished.discard(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write an attribute of a trial."""
        if trial_id not in self._new:
            self.database.set_trial_user_attr(self._id(trial_id), key, value)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write an attribute of a trial."""
        if trial_id not in self._new:
            self.database.set_trial_system_attr(self._id(trial_id), key, value)
        super().set_trial_system_attr(trial_id, key, value)

    def _id(self, trial_id: int) -> int:
        """The database's id of a trial."""
        if trial_id not in self._ids:
            number = self.get_trial_number_from_id(trial_id)
            self._ids[trial_id] = self.database.get_trial_id_from_study_id_trial_number(self._there, number)
        return self._ids[trial_id]
