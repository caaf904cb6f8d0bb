"""The driver of a running study: propose, evaluate, store, until the budget is spent. A kill may come at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

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
from dse.study.float32_comparison import compare_with_float32
from dse.study.folder import StudyFolder
from dse.study.listener import Interrupts, StudyListener, StudyProgress
from dse.study.setup import PreparedStudy
from dse.study.storage import StudyStorage
from dse.study.study import Study
from dse.trial.objectives import measured_limit_violations, with_objective_values
from dse.trial.trial_evaluator import new_record
from dse.trial_record import EVALUATED_STATES, EvaluatedTrial, TrialRecord, json_safe, objective_values

__all__ = ["StudyDriver"]

logger = logging.getLogger("dse")

_FREE_PROPOSALS = 3
"""Infeasible or repeated proposals in a row before a new feasible point is drawn instead: asking takes time, too."""


@dataclass
class StudyDriver:
    """The state of a running study.

    Attributes:
        prepared: Model, space, bank and evaluator.
        folder: The study's folder.
        listener: Receives progress.
        interrupts: Whether the process was asked to stop.
        storage: The open storage.
        fidelity: Early stopping.
        search: Proposes points.
        baseline: The dense model's trial; None until it is complete.
        records: All finished trials.
        by_point: Point id to its first evaluated trial.
        evaluated: Trials that count against the budget.
        idle: Idle power of the device; None without a meter.
    """

    prepared: PreparedStudy
    folder: StudyFolder
    listener: StudyListener
    interrupts: Interrupts
    storage: StudyStorage = field(init=False)
    fidelity: MultiFidelitySession = field(init=False)
    search: SearchSession = field(init=False)
    baseline: EvaluatedTrial | None = None
    records: list[TrialRecord] = field(default_factory=list)
    by_point: dict[str, TrialRecord] = field(default_factory=dict)
    evaluated: int = 0
    idle: IdlePower | None = None
    _begun_s: float = field(default_factory=time.monotonic)
    _evaluated_here: int = 0

    def __post_init__(self) -> None:
        config, objectives, plan = self.prepared.config, self.prepared.objectives, self.prepared.plan
        self.fidelity = MultiFidelitySession(config.fidelity, objectives, self.folder.read_evaluation)
        forecast = LatencyForecast.of(
            plan.profile if plan.predicts_latency else None,
            plan.phases(),
            self.prepared.space.config.limits,
            objectives,
        )
        self.search = SearchSession(
            self.prepared.space,
            objectives,
            config.search_parts,
            config.sampler.seed,
            config.budget.trials,
            self.prepared.enqueued,
            self.prepared.table,
            forecast,
        )
        self.storage = StudyStorage.open(
            self.folder.storage,
            config.name,
            dict(zip((o.name for o in objectives), directions_of(objectives), strict=True)),
            sampler=config.sampler.name,
            seed=config.sampler.seed,
            trials=config.budget.trials,
        )

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

        Ends early if the space has no further feasible point.
        """
        free = _free_proposals(self.records)
        waiting = list(unfinished)
        while self.evaluated < self.prepared.config.budget.trials:
            if not waiting and self.storage.enqueued == 0:
                if free >= _FREE_PROPOSALS:
                    if not self._enqueue_unseen():
                        self.storage.set_attribute("exhausted", True)
                        self.listener.on_message("the space is exhausted: no further point satisfies the limits")
                        return
                    free = 0
                else:
                    chosen = self.search.next(self.by_point, self._generator("search"))
                    if chosen is not None:
                        self.storage.enqueue(chosen)
            proposal = waiting.pop(0) if waiting else self.storage.ask(self.search.space.dimensions)
            free = 0 if self._take(proposal) else free + 1

    def remember(self, record: TrialRecord, evaluation: EvaluationResult | None = None) -> None:
        """Add a finished trial to the state of this process."""
        self.records.append(record)
        self.search.add(record)
        self.fidelity.add(record, evaluation)
        if record.state in EVALUATED_STATES:
            self.evaluated += 1
            self.by_point.setdefault(record.point_id, record)

    def begin_search(self, baseline: EvaluatedTrial) -> None:
        """Fix the reference point of the hypervolume, and queue the first points; safe to repeat after a kill."""
        self.baseline = baseline
        objectives = self.prepared.objectives
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
        self.idle = self.prepared.plan.measure_idle(self.prepared.loaded.device)
        if self.idle is not None:
            self.storage.set_attribute(name, json_safe(dataclasses.asdict(self.idle)))
            power = self.idle.reason or f"{self.idle.power_w:.4g} W"
            self.listener.on_message(f"{name.replace('_', ' ')} the study: {power}")

    def point_of(self, proposal: Proposal) -> DesignPoint:
        """The design point of a proposal, without tensors that the device profile finds slower than dense."""
        point = self.search.space.point(proposal.levels) if proposal.point is None else proposal.point
        return self.prepared.plan.faster_part(point)

    def _take(self, proposal: Proposal) -> bool:
        """Evaluate a proposal, or settle it without an evaluation; returns whether it was evaluated."""
        if proposal.point is None and self.search.decides_points:
            proposal = dataclasses.replace(proposal, point=self.search.space.point(proposal.levels))
            self.storage.set_point(proposal)
        space, point = self.search.space, self.point_of(proposal)
        violations = space.violations(point)
        feasible = all(value <= 0 for value in violations.values())
        record = new_record(proposal, point, self.prepared.loaded.topology, feasible=feasible)
        is_baseline = point.is_dense and self.baseline is None
        if not feasible and not is_baseline:
            self._settle_infeasible(proposal, record, violations)
            return False
        if point.id in self.by_point:
            self._settle_duplicate(record, self.by_point[point.id], violations)
            return False
        self._evaluate(record, violations, is_baseline=is_baseline)
        return True

    def _settle_infeasible(self, proposal: Proposal, record: TrialRecord, violations: dict[str, float]) -> None:
        """Finish an infeasible trial, and queue a feasible neighbour of its point."""
        reason = ", ".join(f"{name} exceeded by {value:.4g}" for name, value in violations.items() if value > 0)
        rung = 0 if self.prepared.config.fidelity else None
        record = dataclasses.replace(record, state="infeasible", reason=reason, rung=rung)
        space = self.search.space
        repaired = space.repair(proposal.levels, self._generator("repair", record.point_id))
        # Queued first: after a kill in between, the trial is repeated, and its neighbour at worst queued twice.
        if repaired is not None and space.point(repaired).id not in self.by_point:
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
            values = objective_values(self.prepared.objectives, earlier)
        self.storage.finish(record, values, violations)
        self.remember(record)

    def _evaluate(self, record: TrialRecord, violations: dict[str, float], *, is_baseline: bool) -> None:
        self.listener.on_trial_start(self.progress(), record)
        logger.info("trial %d: point %s, %s", record.trial, record.point_id, _summary(record))
        rule = self.fidelity.early_stopping(self.baseline)
        record, evaluation = self.prepared.evaluator.evaluate(record, self.baseline, rule, self.idle)
        self.interrupts.check()  # a library may have turned the interrupt into an error of its own
        record, values = with_objective_values(self.prepared.objectives, record)
        violations |= measured_limit_violations(self.search.space.config.limits, record)
        record = dataclasses.replace(record, feasible=all(value <= 0 for value in violations.values()))
        if record.state == "stopped":
            values = self.fidelity.sampler_values(record)
        if is_baseline and values is None:
            raise StudyError(f"the dense model (trial {record.trial}) must be measurable, but: {record.reason}")
        if evaluation is not None:
            self.folder.write_evaluation(record.trial, evaluation)
        self.storage.finish(record, values, violations)
        if is_baseline:
            self.begin_search(EvaluatedTrial(record, evaluation))
            self._report_precision(evaluation)
        self.remember(record, evaluation)
        self._evaluated_here += 1
        self.report_trial(record)

    def report_trial(self, record: TrialRecord) -> None:
        """Write the tables, log the trial and tell the listener; a failed trial checks that the device responds."""
        study = self.study()
        study.write_tables()
        logger.info("trial %d: %s", record.trial, _result(record))
        self.listener.on_trial_end(self.progress(study), record)
        if record.state == "failed":
            self.prepared.evaluator.check_device()

    def study(self) -> Study:
        """The study as this process knows it."""
        return Study.running(self.folder, self.prepared.config, self.storage.attributes, self.records)

    def progress(self, study: Study | None = None) -> StudyProgress:
        """The progress so far, with the front of `study` if given."""
        total, left = self.prepared.config.budget.trials, None
        if self._evaluated_here:
            left = (time.monotonic() - self._begun_s) / self._evaluated_here * (total - self.evaluated)
        front, hypervolume = (study.front_size, study.hypervolume) if study else (0, None)
        return StudyProgress(self.evaluated, total, front, hypervolume, left)

    def _report_precision(self, evaluation: EvaluationResult | None) -> None:
        """Store the effect of half precision on the baseline's metrics, if the model is in half precision."""
        differences = compare_with_float32(self.prepared.config, self.prepared.loaded, evaluation, self.listener)
        if differences is not None:
            self.storage.set_attribute("float32", differences)

    def _enqueue_unseen(self) -> bool:
        levels = unseen_feasible_levels(self.search.space, set(self.by_point), self._generator("unseen"))
        if levels is None:
            return False
        self.storage.enqueue(Proposal(levels, "repaired"))
        return True

    def _generator(self, *purpose: str) -> random.Random:
        """A generator seeded by the evaluated trials, of which a resumed study has as many as an undisturbed one."""
        return random.Random(f"{self.prepared.config.sampler.seed} {self.evaluated} {purpose}")


def _free_proposals(records: list[TrialRecord]) -> int:
    """Number of proposals at the end of these records that were settled without an evaluation."""
    count = 0
    for record in reversed(records):
        if record.state in EVALUATED_STATES:
            break
        count += record.state != "interrupted"
    return count


def _summary(record: TrialRecord) -> str:
    """`12 tensors decomposed, reduction 8.3 % (allocation)`."""
    removed, decomposed = len(record.point.removed), len(record.point) - len(record.point.removed)
    parts = [f"{decomposed} tensors decomposed"] if decomposed or not removed else []
    parts += [f"{removed} blocks removed"] if removed else []
    what = "dense" if record.is_dense else ", ".join(parts)
    return f"{what}, reduction {100 * record.cost['reduction']:.1f} % ({record.origin})"


def _result(record: TrialRecord) -> str:
    if record.state != "complete":
        return f"{record.state}: {record.reason}"
    return "complete, " + ", ".join(f"{name} {entry.value:.5g}" for name, entry in record.quantities.items())
