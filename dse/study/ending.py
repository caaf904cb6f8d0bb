"""The end of a study: stopped trials get a second look, then fresh documents have a say about the front."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dse.design_point import DesignPoint
from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.search.multi_fidelity.fidelity_session import MultiFidelitySession
from dse.study.evaluate_point import blank_record
from dse.study.events import StudyListener, StudyProgress
from dse.study.final_documents import reevaluate_front
from dse.study.folder import StudyFolder
from dse.study.interrupts import Interrupts
from dse.study.outcome import broken_limits, valued
from dse.study.point_run import Reference
from dse.study.setup import PreparedStudy
from dse.study.storage import StudyStorage
from dse.study.study import Study
from dse.trial_record import TrialRecord

__all__ = ["StudyEnd", "looked_again"]

logger = logging.getLogger("dse")

_SECOND_LOOK = "resume_stopped"
"""Attribute of the study: how many trials there were when the second look was done."""


def looked_again(attributes: Mapping[str, Any], trials: int) -> bool:
    """Whether the second look was had with so many trials."""
    return bool(attributes.get(_SECOND_LOOK) == trials)


@dataclass
class StudyEnd:
    """What is left to do when the budget is spent; every step can be the last before a kill.

    Attributes:
        prepared: The study's parts.
        folder: Where it is kept.
        storage: Open.
        ladder: Knows the trials at the top rung.
        reference: The dense model.
        records: Of all trials, dense first; a trial that climbs on has another record afterwards.
        listener: Told of progress.
        interrupts: Whether the user wants it to stop.
        progress: What listeners are told beside a trial.
    """

    prepared: PreparedStudy
    folder: StudyFolder
    storage: StudyStorage
    ladder: MultiFidelitySession
    reference: Reference
    records: list[TrialRecord]
    listener: StudyListener
    interrupts: Interrupts
    progress: Callable[[Study | None], StudyProgress]

    def run(self) -> None:
        """Second look, then fresh documents."""
        if self.ladder.has_second_look and not looked_again(self.storage.attributes, len(self.records)):
            stopped = [record for record in self.records if record.state == "stopped"]
            if stopped:
                self.listener.on_message(f"a second look at {len(stopped)} stopped trials, by all that is known now")
            self.ladder.resume_stopped_trials(stopped, self.reference, self._climb_on)
            self.storage.set_attribute(_SECOND_LOOK, len(self.records))
        self._ask_fresh_documents()

    def _climb_on(self, before: TrialRecord, judge: EarlyStopping) -> None:
        """Evaluate a stopped trial further, from the answers that are kept, and put what it finds in its record."""
        topology = self.prepared.loaded.topology
        point = DesignPoint.from_json(before.point, topology)
        why = f"{before.why}; " if before.why else ""
        blank = dataclasses.replace(
            blank_record(before.trial, point, topology, before.origin, before.feasible, before.why),
            why=f"{why}stopped at rung {before.rung}, it got a second look at the end",
        )
        self.listener.on_trial_start(self.progress(None), blank)
        logger.info("trial %d gets a second look", before.trial)
        record, evaluation = self.prepared.evaluator.evaluate(blank, point, self.reference, judge)
        if self.interrupts.requested:
            raise KeyboardInterrupt
        record, _ = valued(self.prepared.objectives, record)
        broken = broken_limits(self.prepared.space.config.limits, record)
        record = dataclasses.replace(record, feasible=record.feasible and all(value <= 0 for value in broken.values()))
        phases = dict.fromkeys([*before.seconds, *record.seconds])
        seconds = {phase: before.seconds.get(phase, 0.0) + record.seconds.get(phase, 0.0) for phase in phases}
        record = dataclasses.replace(record, seconds=seconds)
        if evaluation is not None:
            self.folder.write_evaluation(record.trial, evaluation)
        self.storage.revise(record)
        self.records[self.records.index(before)] = record
        self.ladder.add(record, evaluation)
        study = Study.running(self.folder, self.prepared.config, self.storage.attributes, self.records)
        study.write_tables()
        self.listener.on_trial_end(self.progress(study), record)
        if record.state == "failed":
            self.prepared.evaluator.check_device()

    def _ask_fresh_documents(self) -> None:
        if self.prepared.final is None:
            return

        def progress(done: int, total: int) -> None:
            if self.interrupts.requested:
                raise KeyboardInterrupt
            self.listener.on_phase("evaluate the front", done, total)

        self.listener.on_message("evaluating the front on documents that the search did not see")
        reevaluate_front(
            self.prepared.final,
            self.reference.record,
            lambda: (
                Study.running(self.folder, self.prepared.config, self.storage.attributes, self.records).front_records
            ),
            self.storage.attributes.get("final", {}),
            lambda known: self.storage.set_attribute("final", known),
            progress,
        )
