"""A running study: propose, evaluate, tell, until the budget is spent; every step can be the last before a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from dataclasses import dataclass, field

from dse.design_point import DesignPoint
from dse.errors import StudyError, UserError
from dse.evaluation import EvaluationResult
from dse.pareto import directions_of, reference_point
from dse.search.candidate import Candidate
from dse.search.latency_forecast import LatencyForecast
from dse.search.multi_fidelity.fidelity_session import MultiFidelitySession
from dse.search.search_session import SearchSession
from dse.search.start_up_points import unseen_feasible_levels
from dse.study.ending import StudyEnd
from dse.study.evaluate_point import Reference, blank_record
from dse.study.events import StudyListener, StudyProgress
from dse.study.facts import check_same_facts, study_facts
from dse.study.folder import StudyFolder
from dse.study.interrupts import Interrupts
from dse.study.objectives import objective_values
from dse.study.outcome import broken_limits, valued
from dse.study.precision import compare_with_float32
from dse.study.setup import PreparedStudy
from dse.study.storage import Proposal, StudyStorage
from dse.study.study import Study, write_reports
from dse.trial_record import EVALUATED_STATES, TrialRecord, finite

__all__ = ["StudyLoop"]

logger = logging.getLogger("dse")

_FREE_PROPOSALS = 3
"""Infeasible or repeated proposals in a row before a feasible new point is drawn instead: asking costs time too."""


@dataclass
class StudyLoop:
    """The state of a running study."""

    prepared: PreparedStudy
    folder: StudyFolder
    listener: StudyListener
    interrupts: Interrupts
    storage: StudyStorage = field(init=False)
    ladder: MultiFidelitySession = field(init=False)
    search: SearchSession = field(init=False)
    reference: Reference | None = None
    records: list[TrialRecord] = field(default_factory=list)
    by_point: dict[str, TrialRecord] = field(default_factory=dict)
    evaluated: int = 0
    begun_s: float = field(default_factory=time.monotonic)
    evaluated_here: int = 0

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.ladder = MultiFidelitySession(config.fidelity, self.prepared.objectives, self.folder.read_evaluation)
        self.search = SearchSession(
            self.prepared.space,
            self.prepared.objectives,
            config.search_parts,
            config.sampler.seed,
            config.budget.trials,
            self.prepared.enqueued,
            self.prepared.divergences,
            LatencyForecast.of(
                self.prepared.evaluator.plan, self.prepared.space.config.limits, self.prepared.objectives
            ),
        )
        self.storage = StudyStorage.open(
            self.folder.storage,
            directions_of(self.prepared.objectives),
            sampler=config.sampler.name,
            seed=config.sampler.seed,
            trials=config.budget.trials,
        )

    def run(self) -> None:
        """Propose and evaluate until the budget is spent or the space is exhausted."""
        try:
            free = self._resume_or_start()
            self._take_idle_power("idle_power_before")
            while self.evaluated < self.prepared.config.budget.trials:
                if self.storage.enqueued == 0 and free >= _FREE_PROPOSALS:
                    if not self._enqueue_unseen():
                        self.storage.set_attribute("exhausted", True)
                        self.listener.on_message("no further point lies within the limits: the space is exhausted")
                        break
                    free = 0
                elif self.storage.enqueued == 0:
                    self._enqueue(self.search.next(self.by_point, self._generator("search")))
                proposal = self._ask()
                free = 0 if self._take(proposal) else free + 1
            self._take_idle_power("idle_power_after")
            self._end()
        except BaseException:
            self.storage.close()
            with contextlib.suppress(UserError):  # what ended the run is worth more than its tables
                Study(self.folder.path).write_tables()
            raise
        self.storage.close()
        write_reports(Study(self.folder.path))

    def _take_idle_power(self, name: str) -> None:
        """Measure the power at rest, where energy is measured, and keep it with the study."""
        idle = self.prepared.evaluator.plan.take_idle_power(self.prepared.loaded.device)
        if idle is not None:
            self.storage.set_attribute(name, finite(dataclasses.asdict(idle)))
            power = idle.reason or f"{idle.power_w:.4g} W"
            self.listener.on_message(f"{name.replace('_', ' ')} the study: {power}")

    def _resume_or_start(self) -> int:
        """Bring the storage and this process to the same state; returns the free proposals in a row so far."""
        facts = study_facts(self.prepared)
        records, unfinished = self.storage.records(), self.storage.unfinished()
        is_new = not any(record.state in EVALUATED_STATES for record in records)
        if not is_new:
            for notice in check_same_facts(self.folder.path, self.storage.attributes.get("facts", {}), facts):
                self.listener.on_message(notice)
        with self.storage.at_once():
            if is_new:
                self.storage.set_attribute("facts", facts)
                self.storage.set_attribute("objectives", [entry.name for entry in self.prepared.objectives])
            for proposal in unfinished:
                self._interrupt(proposal, "the process was stopped during this trial")
            self._restore_reference(records)
            if self.reference is None and self.storage.enqueued == 0:
                self.storage.enqueue(self.prepared.space.dense_levels, "dense")
        if "reference" in self.storage.attributes:
            dense = None if self.reference is None else self.reference.record
            self.search.begin(self.storage.attributes["reference"], dense)
        for record in self.storage.records():
            self._remember(record)
            self.ladder.add(record)
        self._enqueue_added()
        if records or unfinished:
            budget = self.prepared.config.budget.trials
            self.listener.on_message(f"going on with {self.evaluated} of {budget} trials done")
        return _free_proposals(records)

    def _enqueue_added(self) -> None:
        """Queue own points that the study file has got since the study began."""
        if self.reference is None:
            return  # they are queued behind the dense model
        kept = self.prepared.evaluator.plan.kept
        known = {record.point_id for record in self.records}
        for point in self.prepared.enqueued:
            candidate = self.search.own(point)
            beside = None if candidate.point is None else candidate.point.to_json()
            if kept(point).id not in known and not self.storage.is_enqueued(candidate.levels, beside):
                self._enqueue(candidate)

    def _restore_reference(self, records: list[TrialRecord]) -> None:
        dense = next((r for r in records if r.state == "complete" and not r.point["tensors"]), None)
        if dense is not None:
            evaluation = self.folder.read_evaluation(dense.trial) if dense.tasks else None
            self.reference = Reference(evaluation, dense)

    def _interrupt(self, proposal: Proposal, reason: str) -> None:
        """Close a trial that did not come to its end, and queue its point again."""
        point = self._point(proposal)
        blank = blank_record(proposal.trial, point, self.prepared.loaded.topology, proposal.origin, why=proposal.why)
        with self.storage.at_once():
            self.storage.tell(dataclasses.replace(blank, state="interrupted", reason=reason), None, {})
            # The dense model is queued when a run begins: it must come before every point that refers to it.
            if proposal.origin != "dense":
                self.storage.enqueue(proposal.levels, "retried", first=True, why=proposal.why, point=proposal.point)

    def _remember(self, record: TrialRecord) -> None:
        self.records.append(record)
        self.search.add(record)
        if record.state in EVALUATED_STATES:
            self.evaluated += 1
            self.by_point.setdefault(record.point_id, record)

    def _take(self, proposal: Proposal) -> bool:
        """Evaluate a proposal, or settle it without; returns whether it was evaluated."""
        space = self.search.space
        point = self._point(proposal)
        violations = space.violations(point)
        feasible = all(value <= 0 for value in violations.values())
        blank = blank_record(
            proposal.trial, point, self.prepared.loaded.topology, proposal.origin, feasible, proposal.why
        )
        is_reference = point.is_dense and self.reference is None
        if not feasible and not is_reference:
            blank = dataclasses.replace(blank, rung=0 if self.prepared.config.fidelity else None)
            reason = ", ".join(f"{name} exceeded by {value:.4g}" for name, value in violations.items() if value > 0)
            repaired = space.repair(proposal.levels, self._generator("repair", point.id))
            record = dataclasses.replace(blank, state="infeasible", reason=reason)
            with self.storage.at_once():
                self.storage.tell(record, None, violations)
                if repaired is not None and space.point(repaired).id not in self.by_point:
                    self.storage.enqueue(repaired, "repaired")
            self._remember(record)
            return False
        if point.id in self.by_point:
            self._reuse(blank, self.by_point[point.id], violations)
            return False
        self._evaluate(proposal, blank, point, violations)
        return True

    def _reuse(self, blank: TrialRecord, earlier: TrialRecord, violations: dict[str, float]) -> None:
        """A point that was evaluated before: its values are told again, marked as a duplicate."""
        failed = f", which failed: {earlier.reason}" if earlier.state == "failed" else ""
        record = dataclasses.replace(
            earlier,
            trial=blank.trial,
            origin=blank.origin,
            why=blank.why,
            state="duplicate",
            duplicate_of=earlier.trial,
            seconds={},
            reason=f"same point as trial {earlier.trial}{failed}",
        )
        values, violations = None, violations | broken_limits(self.search.space.config.limits, earlier)
        if earlier.state == "stopped":
            told = self.ladder.told(earlier, violations)
            values, violations = told.values, dict(told.violations)
        elif not failed:
            values = objective_values(self.prepared.objectives, earlier)
        self.storage.tell(record, values, violations)
        self._remember(record)

    def _evaluate(
        self, proposal: Proposal, blank: TrialRecord, point: DesignPoint, violations: dict[str, float]
    ) -> None:
        self.listener.on_trial_start(self._progress(), blank)
        logger.info("trial %d: point %s (%s)", blank.trial, blank.point_id, blank.point_text)
        try:
            record, evaluation = self.prepared.evaluator.evaluate(
                blank, point, self.reference, self.ladder.judge(self.reference)
            )
            if self.interrupts.requested:  # a library may have made another error of it
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            self._interrupt(proposal, "stopped by the user")
            raise
        record, values = valued(self.prepared.objectives, record)
        violations |= broken_limits(self.search.space.config.limits, record)
        record = dataclasses.replace(record, feasible=all(value <= 0 for value in violations.values()))
        if record.state == "stopped":
            told = self.ladder.told(record, violations)
            values, violations = told.values, dict(told.violations)
        is_reference = point.is_dense and self.reference is None
        if is_reference and values is None:
            # Without the dense model there is nothing to compare with: say why it failed and end.
            self._interrupt(proposal, record.reason)
            raise StudyError(f"the dense model (trial {record.trial}) must be measurable, but: {record.reason}")
        if evaluation is not None:
            self.folder.write_evaluation(record.trial, evaluation)
        with self.storage.at_once():
            self.storage.tell(record, values, violations)
            if is_reference and values is not None:
                self.reference = Reference(evaluation, record)
                self._begin_search(values)
        if is_reference:
            self._report_precision(evaluation)
        self._remember(record)
        self.ladder.add(record, evaluation)
        self.evaluated_here += 1
        study = Study.running(self.folder, self.prepared.config, self.storage.attributes, self.records)
        study.write_tables()
        logger.info("trial %d: %s %s", record.trial, record.state, record.reason or record.quantities)
        self.listener.on_trial_end(self._progress(study), record)
        if record.state == "failed":
            self.prepared.evaluator.check_device()

    def _end(self) -> None:
        """The search is over: stopped trials get a second look, and fresh documents a say about the front."""
        if self.reference is not None:
            StudyEnd(
                self.prepared,
                self.folder,
                self.storage,
                self.ladder,
                self.reference,
                self.records,
                self.listener,
                self.interrupts,
                self._progress,
            ).run()

    def _report_precision(self, evaluation: EvaluationResult | None) -> None:
        """Keep what half precision does to the dense model's metrics, where the model is held so."""
        differences = compare_with_float32(self.prepared.config, self.prepared.loaded, evaluation, self.listener)
        if differences is not None:
            self.storage.set_attribute("float32", differences)

    def _begin_search(self, values: list[float]) -> None:
        """The dense model is known: fix the reference of the hypervolume, and queue what is evaluated first."""
        dense = dict(zip((o.name for o in self.prepared.objectives), values, strict=True))
        self.storage.set_attribute("reference", reference_point(self.prepared.objectives, dense))
        dense_record = None if self.reference is None else self.reference.record
        self.search.begin(self.storage.attributes["reference"], dense_record)
        for candidate in self.search.first():
            self._enqueue(candidate)

    def _ask(self) -> Proposal:
        with self.storage.at_once():
            proposal = self.storage.ask(self.search.space.dimensions)
            if proposal.point is None and self.search.decides_points:
                return self.storage.decide(proposal, self.search.space.point(proposal.levels).to_json())
            return proposal

    def _enqueue(self, candidate: Candidate | None) -> None:
        if candidate is not None:
            point = None if candidate.point is None else candidate.point.to_json()
            self.storage.enqueue(candidate.levels, candidate.origin, why=candidate.why, point=point)

    def _point(self, proposal: Proposal) -> DesignPoint:
        """The point that is meant: the levels' own, or the one beside them, as far as the study takes it."""
        kept = self.prepared.evaluator.plan.kept
        if proposal.point is None:
            return kept(self.search.space.point(proposal.levels))
        return kept(DesignPoint.from_json(proposal.point, self.prepared.loaded.topology))

    def _enqueue_unseen(self) -> bool:
        levels = unseen_feasible_levels(self.search.space, set(self.by_point), self._generator("unseen"))
        if levels is None:
            return False
        self.storage.enqueue(levels, "repaired")
        return True

    def _generator(self, *purpose: str) -> random.Random:
        """Seeded by what an uninterrupted study would have, too: trial numbers shift when a trial is repeated."""
        return random.Random(f"{self.prepared.config.sampler.seed} {self.evaluated} {purpose}")

    def _progress(self, study: Study | None = None) -> StudyProgress:
        total = self.prepared.config.budget.trials
        left = None
        if self.evaluated_here:
            left = (time.monotonic() - self.begun_s) / self.evaluated_here * (total - self.evaluated)
        front, hypervolume = (study.front_size, study.hypervolume) if study else (0, None)
        return StudyProgress(self.evaluated, total, front, hypervolume, left)


def _free_proposals(records: list[TrialRecord]) -> int:
    """Proposals at the end of these records that were settled without an evaluation."""
    count = 0
    for record in reversed(records):
        if record.state in EVALUATED_STATES:
            break
        count += record.state != "interrupted"
    return count
