"""Run a study: propose, evaluate, tell, until the budget is spent; every step can be the last before a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dse.config import StudyConfig, load_study, parse_study
from dse.design_point import DesignPoint
from dse.errors import InvalidMeasurementError, StudyError, UserError
from dse.evaluation import EvaluationCache, EvaluationResult
from dse.files import cache_dir
from dse.pareto import directions_of, reference_point
from dse.study.evaluate_point import Reference, blank_record
from dse.study.events import StudyListener, StudyProgress
from dse.study.facts import check_same_facts, study_facts
from dse.study.fidelity import LadderSession, final_pending, reevaluate_front
from dse.study.folder import StudyFolder
from dse.study.interrupts import Interrupts, noticing_interrupts
from dse.study.objectives import objective_values
from dse.study.precision import compare_with_float32
from dse.study.proposals import first_points, unseen_feasible_levels
from dse.study.record import EVALUATED_STATES, TrialRecord, finite
from dse.study.setup import PreparedStudy, prepare_study
from dse.study.storage import Proposal, StudyStorage
from dse.study.study import Study, begun_study, write_reports

__all__ = ["run_study"]

logger = logging.getLogger("dse")

_FREE_PROPOSALS = 3
"""Infeasible or repeated proposals in a row before a feasible new point is drawn instead: asking costs time too."""


def run_study(
    study: StudyConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    trials: int | None = None,
    use_cache: bool = True,
    listener: StudyListener | None = None,
) -> Study:
    """Run a study, or go on with one, until its budget of trials is spent.

    Args:
        study: A study file, or what it holds as a mapping or a parsed config.
        out: Folder of the study; `runs/<study name>` by default.
        trials: Evaluated points in all, the dense model included; overrides the file.
        use_cache: Whether answers of earlier evaluations of the same model, point and documents are used, and this
            study's kept in the user's cache. Otherwise they lie in the study's folder until it is finished.
        listener: Told of progress.

    Returns:
        The finished study.

    Raises:
        UserError: The study cannot be run as it stands; nothing was evaluated, and nothing measured before is lost.
        KeyboardInterrupt: Stopped by the user; all finished trials are kept and the same call goes on.
    """
    config = _config_of(study)
    if trials is not None:
        config = config.model_copy(update={"budget": config.budget.model_copy(update={"trials": trials})})
    folder = StudyFolder(Path(out) if out is not None else Path("runs") / config.name)
    watcher = listener or StudyListener()
    folder.check_usable()
    with folder.locked():
        begun = begun_study(folder.path)
        folder.check_same(config, begun.evaluated_trials if begun is not None else 0)
        begun = begun if folder.storage.exists() else None
        if begun is not None and _is_finished(begun, config, watcher):
            folder.write_config(config)
            finished = Study(folder.path)
            write_reports(finished)
            return finished
        cache = EvaluationCache(cache_dir() / "evaluations" if use_cache else folder.answers)
        prepared = prepare_study(config, watcher, None if begun is None else begun.attributes["objectives"], cache)
        folder.write_config(config)
        with folder.logging_to_file(), noticing_interrupts() as interrupts:
            _Loop(prepared, folder, watcher, interrupts).run()
        folder.drop_answers()
    return Study(folder.path)


def _config_of(study: StudyConfig | Mapping[str, Any] | str | Path) -> StudyConfig:
    if isinstance(study, StudyConfig):
        return study
    return parse_study(dict(study)) if isinstance(study, Mapping) else load_study(Path(study))


def _is_finished(study: Study, config: StudyConfig, listener: StudyListener) -> bool:
    """Whether nothing is left to do: no model needs loading to say so."""
    if config.fidelity is not None and config.fidelity.final_documents and _has_pending(study):
        return False
    if study.evaluated_trials >= config.budget.trials:
        listener.on_message(f"complete: all {config.budget.trials} trials are there")
        return True
    if study.is_exhausted:
        listener.on_message(
            f"complete: {study.evaluated_trials} trials are there, and the space holds no further point"
        )
        return True
    return False


def _has_pending(study: Study) -> bool:
    return final_pending(study.front_records, study.attributes.get("final", {}))


@dataclass
class _Loop:
    """The state of a running study."""

    prepared: PreparedStudy
    folder: StudyFolder
    listener: StudyListener
    interrupts: Interrupts
    storage: StudyStorage = field(init=False)
    ladder: LadderSession = field(init=False)
    reference: Reference | None = None
    records: list[TrialRecord] = field(default_factory=list)
    by_point: dict[str, TrialRecord] = field(default_factory=dict)
    evaluated: int = 0
    begun_s: float = field(default_factory=time.monotonic)
    evaluated_here: int = 0

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.ladder = LadderSession(config.fidelity, self.prepared.objectives, self.folder.read_evaluation)
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
                if free >= _FREE_PROPOSALS and self.storage.enqueued == 0:
                    if not self._enqueue_unseen():
                        self.storage.set_attribute("exhausted", True)
                        self.listener.on_message("no further point lies within the limits: the space is exhausted")
                        break
                    free = 0
                proposal = self.storage.ask(self.prepared.space.dimensions)
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
        for record in self.storage.records():
            self._remember(record)
            self.ladder.add(record)
        if records or unfinished:
            budget = self.prepared.config.budget.trials
            self.listener.on_message(f"going on with {self.evaluated} of {budget} trials done")
        return _free_proposals(records)

    def _restore_reference(self, records: list[TrialRecord]) -> None:
        dense = next((r for r in records if r.state == "complete" and not r.point["tensors"]), None)
        if dense is not None:
            evaluation = self.folder.read_evaluation(dense.trial) if dense.tasks else None
            self.reference = Reference(evaluation, dense)

    def _interrupt(self, proposal: Proposal, reason: str) -> None:
        """Close a trial that did not come to its end, and queue its point again."""
        space = self.prepared.space
        blank = blank_record(
            proposal.trial, space.point(proposal.levels), self.prepared.loaded.topology, proposal.origin
        )
        with self.storage.at_once():
            self.storage.tell(dataclasses.replace(blank, state="interrupted", reason=reason), None, {})
            # The dense model is queued when a run begins: it must come before every point that refers to it.
            if proposal.origin != "dense":
                self.storage.enqueue(proposal.levels, "retried", first=True)

    def _remember(self, record: TrialRecord) -> None:
        self.records.append(record)
        if record.state in EVALUATED_STATES:
            self.evaluated += 1
            self.by_point.setdefault(record.point_id, record)

    def _take(self, proposal: Proposal) -> bool:
        """Evaluate a proposal, or settle it without; returns whether it was evaluated."""
        space = self.prepared.space
        point = space.point(proposal.levels)
        violations = space.violations(point)
        feasible = all(value <= 0 for value in violations.values())
        blank = blank_record(proposal.trial, point, self.prepared.loaded.topology, proposal.origin, feasible)
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
            state="duplicate",
            duplicate_of=earlier.trial,
            seconds={},
            reason=f"same point as trial {earlier.trial}{failed}",
        )
        values = None
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
        values: list[float] | None = None
        if record.state == "complete":
            try:
                values = objective_values(self.prepared.objectives, record)
            except InvalidMeasurementError as error:
                record = dataclasses.replace(record, state="failed", reason=str(error))
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
        """The search is over: fresh documents have a say about the front, where the study keeps some."""
        final, reference = self.prepared.final, self.reference
        if final is None or reference is None:
            return

        def progress(done: int, total: int) -> None:
            if self.interrupts.requested:
                raise KeyboardInterrupt
            self.listener.on_phase("evaluate the front", done, total)

        self.listener.on_message("evaluating the front on documents that the search did not see")
        reevaluate_front(
            final,
            reference.record,
            lambda: (
                Study.running(self.folder, self.prepared.config, self.storage.attributes, self.records).front_records
            ),
            self.storage.attributes.get("final", {}),
            lambda known: self.storage.set_attribute("final", known),
            progress,
        )

    def _report_precision(self, evaluation: EvaluationResult | None) -> None:
        """Keep what half precision does to the dense model's metrics, where the model is held so."""
        differences = compare_with_float32(self.prepared.config, self.prepared.loaded, evaluation, self.listener)
        if differences is not None:
            self.storage.set_attribute("float32", differences)

    def _begin_search(self, values: list[float]) -> None:
        """The dense model is known: fix the reference of the hypervolume, and queue what is evaluated first."""
        dense = dict(zip((o.name for o in self.prepared.objectives), values, strict=True))
        self.storage.set_attribute("reference", reference_point(self.prepared.objectives, dense))
        config = self.prepared.config
        proposals = first_points(
            self.prepared.space,
            self.prepared.enqueued,
            sampler=config.sampler.name,
            seed=config.sampler.seed,
            trials=config.budget.trials,
        )
        for levels, origin in proposals:
            self.storage.enqueue(levels, origin)

    def _enqueue_unseen(self) -> bool:
        levels = unseen_feasible_levels(self.prepared.space, set(self.by_point), self._generator("unseen"))
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
