"""The end of a study: promising stopped trials resume, then the front is evaluated, measured and healed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from dse.search.multi_fidelity import EarlyStopping
from dse.study.driver import StudyDriver
from dse.study.healed_front import HEALED, heal_trials, trials_to_heal
from dse.study.other_text_front import OTHER_TEXT, other_text_words
from dse.study.serving_front import MeasureServing, engine_attribute, measure_front, waiting_trials
from dse.trial.objectives import measured_limit_violations, with_objective_values
from dse.trial_record import EvaluatedTrial, TrialRecord
from dse.workers.final_documents import reevaluate_front
from dse.workers.jobs import EvaluateFinal, EvaluateTrial, HealPoint, MeasureOtherText, TrialResult

__all__ = ["finish_study", "has_resumed_stopped"]

logger = logging.getLogger("dse")

_RESUMED, _RESUMED_BEFORE = "resume_stopped", "second_look"
"""Attribute of the study: the number of trials when stopped trials were resumed; its name in version 0.1."""


def has_resumed_stopped(attributes: Mapping[str, Any], trials: int) -> bool:
    """Whether stopped trials were already resumed when the study had this many trials."""
    return bool(attributes.get(_RESUMED, attributes.get(_RESUMED_BEFORE)) == trials)


def finish_study(driver: StudyDriver) -> None:
    """Resume promising stopped trials; evaluate the front on final documents, measure it in the engine, heal it.

    Safe to repeat after a kill.
    """
    baseline = driver.baseline
    if baseline is None:
        return
    fidelity, trials = driver.fidelity, len(driver.records)
    if fidelity.resumes_stopped and not has_resumed_stopped(driver.storage.attributes, trials):
        stopped = [record for record in driver.records if record.state == "stopped"]
        if stopped:
            driver.listener.on_message(f"reconsidering {len(stopped)} stopped trials with all results known now")
        fidelity.resume_stopped_trials(
            stopped, baseline, lambda record, rule: _resume_trial(driver, record, baseline, rule)
        )
        driver.storage.set_attribute(_RESUMED, trials)
    _evaluate_final_documents(driver, baseline.record)
    _measure_other_text(driver)
    _measure_front(driver, baseline.record)
    _heal_front(driver)


def _resume_trial(driver: StudyDriver, before: TrialRecord, baseline: EvaluatedTrial, rule: EarlyStopping) -> None:
    """Evaluate a stopped trial further, from its stored answers, and replace its record."""
    why = f"{before.why}; " if before.why else ""
    record = TrialRecord(
        trial=before.trial,
        state="failed",
        origin=before.origin,
        why=f"{why}stopped at rung {before.rung}, resumed at the end",
        point=before.point,
        point_text=before.point_text,
        feasible=before.feasible,
        cost=before.cost,
    )
    driver.listener.on_trial_start(driver.progress(), record)
    logger.info("trial %d: resuming from rung %s", before.trial, before.rung)
    result: TrialResult = driver.workers.run(EvaluateTrial(record, baseline, rule, driver.idle))
    record, _ = with_objective_values(driver.outline.objectives, result.record)
    violations = measured_limit_violations(driver.outline.space.config.limits, record)
    phases = dict.fromkeys([*before.seconds, *record.seconds])
    record = dataclasses.replace(
        record,
        feasible=record.feasible and all(value <= 0 for value in violations.values()),
        seconds={phase: before.seconds.get(phase, 0.0) + record.seconds.get(phase, 0.0) for phase in phases},
    )
    if result.evaluation is not None:
        driver.folder.write_evaluation(record.trial, result.evaluation)
    driver.storage.revise(record)
    driver.records[driver.records.index(before)] = record
    driver.fidelity.add(record, result.evaluation)
    driver.report_trial(record)


def _evaluate_final_documents(driver: StudyDriver, baseline: TrialRecord) -> None:
    if not driver.outline.has_final:
        return
    driver.listener.on_message("evaluating the front on documents that the search did not see")
    reevaluate_front(
        lambda record: driver.workers.run(EvaluateFinal(record)),
        baseline,
        lambda: driver.study().front_records,
        driver.storage.attributes.get("final", {}),
        lambda known: driver.storage.set_attribute("final", known),
    )


def _measure_other_text(driver: StudyDriver) -> None:
    """Compare the front with the dense model on text of another source, if its methods are calibrated."""
    if not driver.outline.facts.get("calibration"):
        return
    found = dict(driver.storage.attributes.get(OTHER_TEXT, {}))
    front = [record for record in driver.study().front_records if not record.is_dense]
    waiting = [record for record in front if str(record.trial) not in found]
    if waiting:
        driver.listener.on_message(f"comparing {len(waiting)} points with the dense model on text of another source")
    for record in waiting:
        found[str(record.trial)] = driver.workers.run(MeasureOtherText(record))
        driver.storage.set_attribute(OTHER_TEXT, found)
    if words := other_text_words(found):
        driver.listener.on_message(words)


def _measure_front(driver: StudyDriver, baseline: TrialRecord) -> None:
    """Measure the front and its ties in the serving engine, if the study asks for it."""
    settings = driver.outline.config.measurement
    if settings.when != "front":
        return
    attribute = engine_attribute(settings.engine)

    def waiting(known: Mapping[str, Any]) -> list[TrialRecord]:
        return waiting_trials(driver.study().trials(), driver.records, known)

    driver.listener.on_message(f"measuring the front in {settings.engine}")
    measure_front(
        lambda record, dense: driver.workers.run(MeasureServing(record, dense, driver.idle)),
        baseline,
        waiting,
        driver.storage.attributes.get(attribute, {}),
        lambda known: driver.storage.set_attribute(attribute, known),
    )


def _heal_front(driver: StudyDriver) -> None:
    """Train the points on the front, if the study asks for it."""
    if driver.outline.config.healing is None:
        return
    found = driver.storage.attributes.get(HEALED, {})
    waiting = trials_to_heal(driver.study().front_records, found)
    if waiting:
        driver.listener.on_message(f"healing {len(waiting)} points on the front")
    heal_trials(
        lambda record, folder: driver.workers.run(HealPoint(record, str(folder))),
        waiting,
        driver.folder.path,
        found,
        lambda known: driver.storage.set_attribute(HEALED, known),
    )
