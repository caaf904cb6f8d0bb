"""The driver of a running study: propose, submit, store, until the budget is spent. A kill may come at any step.

Workers evaluate; the driver is the only one that proposes and writes. Several trials may be pending at once: submitted,
but not finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from dse.design_point import DesignPoint
from dse.errors import StudyError, UserError
from dse.evaluation import EvaluationResult
from dse.measurement import IdlePower
from dse.pareto import directions_of, reference_point
from dse.search.latency_forecast import LatencyForecast
from dse.search.multi_fidelity import MultiFidelitySession
from dse.search.proposal import Proposal
from dse.search.search_session import SearchSession
from dse.search.start_up_points import unseen_feasible_levels
from dse.study.folder import StudyFolder
from dse.study.storage import RETRY_S, StudyStorage
from dse.study.storage_connection import DatabaseLostError
from dse.study.study import Study
from dse.study.trial_log import proposal_line, result_line
from dse.study.trial_tables import TrialTables
from dse.trial.objectives import measured_limit_violations, with_objective_values
from dse.trial.trial_evaluator import new_record
from dse.trial_record import EVALUATED_STATES, EvaluatedTrial, TrialRecord, json_safe, objective_values
from dse.workers.interface import FinishedJob, Workers
from dse.workers.jobs import CompareFloat32, EvaluateTrial, MeasureIdle, TrialResult
from dse.workers.listener import Interrupts, StudyListener, StudyProgress
from dse.workers.outline import StudyOutline

__all__ = ["StudyDriver"]

logger = logging.getLogger("dse")

_FREE_PROPOSALS = 3
"""Infeasible or repeated proposals in a row before a new feasible point is drawn instead: asking takes time, too."""


@dataclass
class PendingTrial:
    """A trial that was submitted to a worker and is not finished.

    Attributes:
        record: Its record before anything is measured.
        violations: Constraint name to its value.
        is_baseline: Whether it is the dense model's first trial.
        repeats: Later proposals of the same point, with their violations, to be settled with its result.
    """

    record: TrialRecord
    violations: dict[str, float]
    is_baseline: bool
    repeats: list[tuple[TrialRecord, dict[str, float]]] = field(default_factory=list)


@dataclass
class StudyDriver:
    """The state of a running study.

    Attributes:
        workers: Evaluate trials.
        folder: The study's folder.
        listener: Receives progress.
        interrupts: Whether the process was asked to stop.
        storage: The open storage.
        fidelity: Early stopping.
        search: Proposes points.
        baseline: The dense model's trial; None until it is complete.
        records: All finished trials.
        by_point: Point id to its first evaluated trial.
        pending: Point id to its trial in flight.
        taken: Ids of the points that were evaluated or are pending, so that no point is proposed twice.
        evaluated: Trials that count against the budget.
        idle: Idle power of the device; None without a meter.
    """

    workers: Workers
    folder: StudyFolder
    listener: StudyListener
    interrupts: Interrupts
    storage: StudyStorage = field(init=False)
    fidelity: MultiFidelitySession = field(init=False)
    search: SearchSession = field(init=False)
    baseline: EvaluatedTrial | None = None
    records: list[TrialRecord] = field(default_factory=list)
    by_point: dict[str, TrialRecord] = field(default_factory=dict)
    pending: dict[str, PendingTrial] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    evaluated: int = 0
    idle: IdlePower | None = None
    _begun_s: float = field(default_factory=time.monotonic)
    _evaluated_here: int = 0
    _tables: TrialTables = field(init=False)

    def __post_init__(self) -> None:
        config, objectives, plan = self.outline.config, self.outline.objectives, self.outline.plan
        self.fidelity = MultiFidelitySession(config.fidelity, objectives, self.folder.read_evaluation)
        forecast = LatencyForecast.of(
            plan.profile if plan.predicts_latency else None,
            plan.phases(),
            self.outline.space.config.limits,
            objectives,
        )
        self.search = SearchSession(
            self.outline.space,
            objectives,
            config.search_parts,
            config.sampler.seed,
            config.budget.trials,
            self.outline.enqueued,
            self.outline.table,
            forecast,
        )
        self.storage = self._open_storage()
        self.storage.on_wait = self._wait_for_storage
        self._tables = TrialTables(is_parallel=self.workers.count > 1)

    @property
    def outline(self) -> StudyOutline:
        """The study as the workers have prepared it."""
        return self.workers.outline

    def _open_storage(self) -> StudyStorage:
        """Open the storage. It answered before the workers started, so it is waited for."""
        config, objectives = self.outline.config, self.outline.objectives
        waited_s = 0.0
        while True:
            try:
                return StudyStorage.open(
                    self.folder.storage,
                    config.name,
                    dict(zip((o.name for o in objectives), directions_of(objectives), strict=True)),
                    sampler=config.sampler.name,
                    seed=config.sampler.seed,
                    trials=config.budget.trials,
                    is_parallel=self.workers.count > 1,
                )
            except DatabaseLostError as error:
                self._wait_for_storage(str(error), waited_s)
                time.sleep(RETRY_S)
                waited_s += RETRY_S

    def _wait_for_storage(self, reason: str, waited_s: float) -> None:
        """Tell the user, once at first and then once a minute, that the database is away."""
        if self.interrupts.requested:
            raise KeyboardInterrupt
        if waited_s % 60 == 0:
            self.listener.on_message(f"{reason}; waiting for it")
            logger.warning("%s; waiting for it", reason)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close the storage at the end; if the run is cut short, write the tables of what is there."""
        try:
            yield
        except BaseException:
            self.storage.close()
            with contextlib.suppress(UserError):  # the error that ended the run matters more than its tables
                Study(self.folder.path).write_tables()
            raise
        self.storage.close()

    def search_until_spent(self, unfinished: list[Proposal]) -> None:
        """Evaluate the unfinished trials of an earlier run, then propose and evaluate until the budget is spent.

        Ends early if the space has no further feasible point. When the user stops the study, trials that finish within
        the workers' period of grace are stored.
        """
        try:
            self._search(list(unfinished))
        except KeyboardInterrupt:
            for finished in self.workers.finished_in_grace():
                self._finish(finished)
            raise

    def _search(self, waiting: list[Proposal]) -> None:
        free, is_exhausted = self._free_proposals(), False
        while True:
            if is_exhausted or not self._has_room():
                if not self.pending:
                    break
                self._finish(self.workers.next_finished())
                continue
            if not waiting and self.storage.enqueued == 0:
                if free >= _FREE_PROPOSALS:
                    is_exhausted, free = not self._enqueue_unseen(), 0
                    if is_exhausted:
                        continue
                else:
                    chosen = self.search.next(self.taken, self._generator("search"))
                    if chosen is not None:
                        self.storage.enqueue(chosen)
            was_unfinished = bool(waiting)
            proposal = waiting.pop(0) if waiting else self.storage.ask(self.search.space.dimensions)
            free = 0 if self._take(proposal) else free + 1
            if was_unfinished and not waiting:
                free = self._free_proposals()
        if is_exhausted:
            self.storage.set_attribute("exhausted", True)
            self.listener.on_message("the space is exhausted: no further point satisfies the limits")

    def _has_room(self) -> bool:
        """Whether another trial may be submitted; the baseline comes alone, because the first points depend on it."""
        if self.baseline is None and self.pending:
            return False
        in_flight = len(self.pending)
        return in_flight < self.workers.slots and self.evaluated + in_flight < self.outline.config.budget.trials

    def _free_proposals(self) -> int:
        """Number of proposals since the last submitted one, all of them settled without an evaluation."""
        submitted = [record.trial for record in self.records if record.state in EVALUATED_STATES]
        submitted += [trial.record.trial for trial in self.pending.values()]
        last = max(submitted, default=-1)
        settled = [record.trial for record in self.records if record.state != "interrupted"]
        settled += [record.trial for trial in self.pending.values() for record, _ in trial.repeats]
        return sum(trial > last for trial in settled)

    def remember(self, record: TrialRecord, evaluation: EvaluationResult | None = None) -> None:
        """Add a finished trial to the state of this process."""
        self.records.append(record)
        self.search.add(record)
        self.fidelity.add(record, evaluation)
        if record.state in EVALUATED_STATES:
            self.evaluated += 1
            self.by_point.setdefault(record.point_id, record)
            self.taken.add(record.point_id)

    def begin_search(self, baseline: EvaluatedTrial) -> None:
        """Fix the reference point of the hypervolume, and queue the first points; safe to repeat after a kill."""
        self.baseline = baseline
        objectives = self.outline.objectives
        values = objective_values(objectives, baseline.record)
        dense = dict(zip((objective.name for objective in objectives), values, strict=True))
        reference = self.storage.attributes.get("reference")
        self.search.begin(reference or reference_point(objectives, dense), baseline.record)
        if reference is None:
            for proposal in self.search.first():
                if not self.storage.is_enqueued(proposal):
                    self.storage.enqueue(proposal)
            self.storage.set_attribute("reference", reference_point(objectives, dense))

    def measure_idle(self, name: str) -> None:
        """Measure the idle power, if energy is measured, and store it with the study."""
        self.idle = self.workers.run(MeasureIdle())
        if self.idle is not None:
            self.storage.set_attribute(name, json_safe(dataclasses.asdict(self.idle)))
            power = self.idle.reason or f"{self.idle.power_w:.4g} W"
            self.listener.on_message(f"{name.replace('_', ' ')} the study: {power}")

    def point_of(self, proposal: Proposal) -> DesignPoint:
        """The design point of a proposal, without tensors that the device profile finds slower than dense."""
        point = self.search.space.point(proposal.levels) if proposal.point is None else proposal.point
        return self.outline.plan.faster_part(point)

    def _take(self, proposal: Proposal) -> bool:
        """Submit a proposal to the workers, or settle it without an evaluation; returns whether it was submitted."""
        if proposal.point is None and self.search.decides_points:
            proposal = dataclasses.replace(proposal, point=self.search.space.point(proposal.levels))
            self.storage.set_point(proposal)
        space, point = self.search.space, self.point_of(proposal)
        violations = space.violations(point)
        feasible = all(value <= 0 for value in violations.values())
        record = new_record(proposal, point, self.outline.topology, feasible=feasible)
        is_baseline = point.is_dense and self.baseline is None
        if not feasible and not is_baseline:
            self._settle_infeasible(proposal, record, violations)
            return False
        if point.id in self.by_point:
            self._settle_duplicate(record, self.by_point[point.id], violations)
            return False
        if point.id in self.pending:
            self.pending[point.id].repeats.append((record, violations))
            return False
        self._submit(PendingTrial(record, violations, is_baseline))
        return True

    def _settle_infeasible(self, proposal: Proposal, record: TrialRecord, violations: dict[str, float]) -> None:
        """Finish an infeasible trial, and queue a feasible neighbour of its point."""
        reason = ", ".join(f"{name} exceeded by {value:.4g}" for name, value in violations.items() if value > 0)
        rung = 0 if self.outline.config.fidelity else None
        record = dataclasses.replace(record, state="infeasible", reason=reason, rung=rung)
        space = self.search.space
        repaired = space.repair(proposal.levels, self._generator("repair", record.point_id))
        # Queued first: after a kill in between, the trial is repeated, and its neighbour at worst queued twice.
        if repaired is not None and space.point(repaired).id not in self.taken:
            self.storage.enqueue(Proposal(repaired, "repaired"))
        self.storage.finish(record, None, violations)
        self.remember(record)

    def _settle_duplicate(self, record: TrialRecord, earlier: TrialRecord, violations: dict[str, float]) -> None:
        """Finish a trial whose point was evaluated before, with the values of that trial."""
        failed = f", which failed: {earlier.reason}" if earlier.state == "failed" else ""
        record = dataclasses.replace(
            earlier,
            trial=record.trial,
            origin=record.origin,
            why=record.why,
            state="duplicate",
            duplicate_of=earlier.trial,
            seconds={},
            reason=f"same point as trial {earlier.trial}{failed}",
        )
        violations = violations | measured_limit_violations(self.search.space.config.limits, earlier)
        values = None
        if earlier.state == "stopped":
            values = self.fidelity.sampler_values(earlier)
        elif not failed:
            values = objective_values(self.outline.objectives, earlier)
        self.storage.finish(record, values, violations)
        self.remember(record)

    def _submit(self, trial: PendingTrial) -> None:
        record = trial.record
        self.listener.on_trial_start(self.progress(), record)
        logger.info("trial %d: point %s, %s", record.trial, record.point_id, proposal_line(record))
        self.pending[record.point_id] = trial
        self.taken.add(record.point_id)
        rule = self.fidelity.early_stopping(self.baseline)
        self.workers.submit(EvaluateTrial(record, self.baseline, rule, self.idle))

    def _finish(self, finished: FinishedJob) -> None:
        """Store a finished trial, and settle the proposals that repeat its point."""
        with self.interrupts.held():
            trial = self.pending[cast(EvaluateTrial, finished.job).record.point_id]
            result: TrialResult = finished.result
            if finished.gave_up:
                result = TrialResult(dataclasses.replace(trial.record, reason=finished.gave_up), None)
            record = self._store(trial, result)
            del self.pending[record.point_id]
            for repeated, violations in trial.repeats:
                self._settle_duplicate(repeated, record, violations)
        if trial.is_baseline:
            self._report_precision(result.evaluation)
        self.report_trial(record)

    def _store(self, trial: PendingTrial, result: TrialResult) -> TrialRecord:
        record, values = with_objective_values(self.outline.objectives, result.record)
        violations = trial.violations | measured_limit_violations(self.search.space.config.limits, record)
        record = dataclasses.replace(record, feasible=all(value <= 0 for value in violations.values()))
        if record.state == "stopped":
            values = self.fidelity.sampler_values(record)
        if trial.is_baseline and values is None:
            raise StudyError(f"the dense model (trial {record.trial}) must be measurable, but: {record.reason}")
        if result.evaluation is not None:
            self.folder.write_evaluation(record.trial, result.evaluation)
        self.storage.finish(record, values, violations)
        if trial.is_baseline:
            self.begin_search(EvaluatedTrial(record, result.evaluation))
        self.remember(record, result.evaluation)
        self._evaluated_here += 1
        return record

    def report_trial(self, record: TrialRecord) -> None:
        """Write the tables, log the trial and tell the listener; a failed trial checks that the device responds."""
        self._tables.refresh(self.study)
        logger.info("trial %d: %s", record.trial, result_line(record))
        self.listener.on_trial_end(self.progress(), record)
        if record.state == "failed":
            self.workers.check_device()

    def study(self) -> Study:
        """The study as this process knows it."""
        return Study.running(self.folder, self.outline.config, self.storage.attributes, self.records)

    def progress(self) -> StudyProgress:
        """The progress so far, with the front of the last tables."""
        total, left = self.outline.config.budget.trials, None
        if self._evaluated_here:
            left = (time.monotonic() - self._begun_s) / self._evaluated_here * (total - self.evaluated)
        return StudyProgress(self.evaluated, total, self._tables.front_size, self._tables.hypervolume, left)

    def _report_precision(self, evaluation: EvaluationResult | None) -> None:
        """Store the effect of half precision on the baseline's metrics, if the model is in half precision."""
        differences = self.workers.run(CompareFloat32(evaluation))
        if differences is not None:
            self.storage.set_attribute("float32", differences)

    def _enqueue_unseen(self) -> bool:
        levels = unseen_feasible_levels(self.search.space, self.taken, self._generator("unseen"))
        if levels is None:
            return False
        self.storage.enqueue(Proposal(levels, "repaired"))
        return True

    def _generator(self, *purpose: str) -> random.Random:
        """A generator seeded by the number of submitted trials, which a resumed study and an undisturbed one share."""
        submitted = self.evaluated + len(self.pending)
        return random.Random(f"{self.outline.config.sampler.seed} {submitted} {purpose}")
