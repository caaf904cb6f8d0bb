"""Bring a new process to the state of a study: what is stored, what must not have changed, what is unfinished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dse.errors import StudyError
from dse.search.proposal import Proposal
from dse.study.driver import StudyDriver
from dse.trial_record import EVALUATED_STATES, EvaluatedTrial, TrialRecord
from dse.workers.same_study import MUST_STAY

__all__ = ["resume_or_start"]


def resume_or_start(driver: StudyDriver) -> list[Proposal]:
    """Store the facts of a new study, or check them and restore the trials of an existing one.

    Returns:
        Proposals that an earlier process left unfinished, to be evaluated first.

    Raises:
        StudyError: The study cannot resume with this model, tasks or calibration text.
    """
    outline, storage = driver.outline, driver.storage
    facts, records = outline.facts, storage.records()
    if any(record.state in EVALUATED_STATES for record in records):
        for notice in _check_same_facts(driver.folder.path, storage.attributes.get("facts", {}), facts):
            driver.listener.on_message(notice)
    else:
        storage.set_attribute("facts", facts)
        storage.set_attribute("objectives", [entry.name for entry in outline.objectives])
    baseline = _baseline(driver, records)
    if baseline is not None:
        driver.begin_search(baseline)
    for record in records:
        driver.remember(record)
    unfinished = storage.unfinished(driver.search.space.dimensions)
    if baseline is not None:
        _enqueue_added(driver, unfinished)
    elif not unfinished and storage.enqueued == 0:
        storage.enqueue(Proposal(outline.space.dense_levels, "dense"))
    if records or unfinished:
        budget = outline.config.budget.trials
        driver.listener.on_message(f"resuming: {driver.evaluated} of {budget} trials are done")
    return unfinished


def _baseline(driver: StudyDriver, records: Sequence[TrialRecord]) -> EvaluatedTrial | None:
    record = next((record for record in records if record.state == "complete" and record.is_dense), None)
    if record is None:
        return None
    return EvaluatedTrial(record, driver.folder.read_evaluation(record.trial) if record.tasks else None)


def _enqueue_added(driver: StudyDriver, unfinished: Sequence[Proposal]) -> None:
    """Queue points that were added to the study file's `enqueue` since the study started."""
    known = {record.point_id for record in driver.records} | {driver.point_of(entry).id for entry in unfinished}
    for point in driver.outline.enqueued:
        proposal = driver.search.user_proposal(point)
        if driver.point_of(proposal).id not in known and not driver.storage.is_enqueued(proposal):
            driver.storage.enqueue(proposal)


def _check_same_facts(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Refuse to resume if new trials would not be comparable with the existing ones.

    Returns:
        Notices about differences that leave ratios comparable.

    Raises:
        StudyError: The model, the tasks or the calibration text have changed.
    """
    for fact, (what, remedy) in MUST_STAY.items():
        if before.get(fact) != now[fact]:
            raise StudyError(
                f"{folder} started with other {what} ({before.get(fact)}, now {now[fact]}); {remedy}, or choose"
                " another `--out`"
            )
    if _hardware(before) != _hardware(now):
        return [
            f"this study started on other hardware ({_hardware(before)}, now {_hardware(now)}): latencies are ratios"
            " to the dense model measured beside each point, and ratios can differ between machines"
        ]
    return []


def _hardware(facts: Mapping[str, Any]) -> str:
    environment = facts.get("environment") or {}
    gpus = [str(gpu.get("name")) for gpu in environment.get("gpus") or [] if isinstance(gpu, Mapping)]
    return ", ".join([str(facts.get("device")), str((environment.get("cpu") or {}).get("model")), *gpus])
