"""Heal trials of a study: train their factors, evaluate them again, and keep the weights in the study's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from dse.config import HealingConfig
from dse.errors import StudyError
from dse.evaluation import ModelEvaluator, evaluator_for
from dse.models import LoadedModel
from dse.search.spaces.base import SearchSpace
from dse.study import Study, StudyListener, load_study_model, study_bank
from dse.study.healed_front import HEALED, heal_trials, trials_to_heal
from dse.study.storage import StudyStorage
from dse.trial.healed_trial import TrialHealer
from dse.trial_record import TrialRecord

__all__ = ["heal_study"]


def heal_study(
    directory: str | Path,
    trials: Sequence[int] = (),
    *,
    settings: HealingConfig | None = None,
    again: bool = False,
    listener: StudyListener | None = None,
) -> Study:
    """Heal trials of a study; those that are healed already stay as they are.

    Args:
        directory: The folder of the study.
        trials: Numbers of complete trials; none heals the front.
        settings: How to train; None takes the study's section `healing`, or the defaults.
        again: Whether to heal trials that are healed already.
        listener: Receives progress.

    Returns:
        The study, with quantities such as `healed.accuracy` and with its reports written again.

    Raises:
        StudyError: The folder holds no study, a trial is not complete, or the model has changed.
        CalibrationError: The training text cannot be read.
    """
    watcher = listener or StudyListener()
    study = Study(Path(directory))
    settings = settings or study.config.healing or HealingConfig()
    with study.folder.locked():
        found = {} if again else study.attributes.get(HEALED, {})
        waiting = trials_to_heal(_chosen(study, trials), found)
        if not waiting:
            watcher.on_message("complete: every trial is healed; `--again` heals them once more")
            return study
        watcher.on_message(f"loading {study.config.model.ref}")
        loaded = load_study_model(study.config)
        study.check_model(loaded.fingerprint)
        space = SearchSpace.from_config(study.config.constrained_space, loaded.topology)
        bank, _ = study_bank(study.config, loaded, space, watcher, [record.point for record in waiting])
        healer = TrialHealer(study.config, settings, loaded, bank, _evaluator(study, loaded), watcher.on_phase)
        storage = StudyStorage.open_existing(study.folder.storage)
        with contextlib.closing(storage):
            heal_trials(
                healer.heal,
                waiting,
                Path(directory),
                study.attributes.get(HEALED, {}),
                lambda known: storage.set_attribute(HEALED, known),
            )
    healed = Study(Path(directory))
    healed.write_reports()
    return healed


def _chosen(study: Study, trials: Sequence[int]) -> list[TrialRecord]:
    if not trials:
        return list(study.front_records)
    records = [study.record(number) for number in dict.fromkeys(trials)]
    for record in records:
        if record.state != "complete" or record.is_dense:
            kind = "the dense model" if record.is_dense else record.state
            raise StudyError(f"healing needs complete trials of decomposed points, but trial {record.trial} is {kind}")
    return records


def _evaluator(study: Study, loaded: LoadedModel) -> ModelEvaluator | None:
    """The evaluator on the documents that the study's own final values come from."""
    config = study.config
    if not config.tasks:
        return None
    fresh = 0 if config.fidelity is None else config.fidelity.final_documents or 0
    return evaluator_for(loaded, config.tasks, config.evaluation, fresh=fresh)
