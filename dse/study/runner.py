"""Run a study: propose, evaluate, tell, until the budget is spent; every step can be the last before a kill."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from dse.config import StudyConfig, load_study
from dse.design_point import DesignPoint
from dse.errors import StudyError
from dse.measurement import describe_environment
from dse.pareto import directions_of, reference_point
from dse.study.evaluate_point import Reference, blank_record
from dse.study.events import StudyListener, StudyProgress
from dse.study.folder import StudyFolder
from dse.study.objectives import objective_values
from dse.study.proposals import enqueue_first_points, unseen_feasible_levels
from dse.study.record import TrialRecord
from dse.study.setup import PreparedStudy, prepare_study
from dse.study.storage import Proposal, StudyStorage
from dse.study.study import Study, write_reports

__all__ = ["run_study"]

logger = logging.getLogger("dse")

_FREE_PROPOSALS = 3
"""Infeasible or repeated proposals in a row before a feasible new point is drawn instead: asking costs time too."""


def run_study(
    study: StudyConfig | str | Path,
    *,
    out: str | Path | None = None,
    trials: int | None = None,
    listener: StudyListener | None = None,
) -> Study:
    """Run a study, or go on with one, until its budget of trials is spent.

    Args:
        study: A study file, or its parsed config.
        out: Folder of the study; `runs/<study name>` by default.
        trials: Evaluated points in all, the dense model included; overrides the file.
        listener: Told of progress.

    Returns:
        The finished study.

    Raises:
        UserError: The study cannot be run as it stands; nothing was evaluated, and nothing measured before is lost.
        KeyboardInterrupt: Stopped by the user; all finished trials are kept and the same call goes on.
    """
    config = study if isinstance(study, StudyConfig) else load_study(Path(study))
    if trials is not None:
        budget = config.budget.model_copy(update={"trials": trials})
        config = config.model_copy(update={"budget": budget})
    folder = StudyFolder(Path(out) if out is not None else Path("runs") / config.name)
    folder.check(config)
    watcher = listener or StudyListener()
    existing = _finished_study(folder, config)
    if existing is not None:
        watcher.on_message(f"complete: all {config.budget.trials} trials are there")
        return existing
    prepared = prepare_study(config, watcher)
    folder.prepare(config)
    with folder.locked(), folder.logging_to_file():
        _Loop(prepared, folder, watcher).run()
    return Study(folder.path)


def _finished_study(folder: StudyFolder, config: StudyConfig) -> Study | None:
    """The study of this folder if its budget is spent already: no model needs loading to say so."""
    if not folder.storage.exists():
        return None
    study = Study(folder.path)
    if study.evaluated_trials < config.budget.trials and not study.is_exhausted:
        return None
    write_reports(study)
    return study


@dataclass
class _Loop:
    """The state of a running study."""

    prepared: PreparedStudy
    folder: StudyFolder
    listener: StudyListener
    storage: StudyStorage = field(init=False)
    reference: Reference | None = None
    by_point: dict[str, TrialRecord] = field(default_factory=dict)
    evaluated: int = 0
    begun_s: float = field(default_factory=time.monotonic)
    evaluated_here: int = 0

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.storage = StudyStorage.open(
            self.folder.storage,
            directions_of(self.prepared.objectives),
            sampler=config.sampler.name,
            seed=config.sampler.seed,
            trials=config.budget.trials,
        )

    def run(self) -> None:
        """Propose and evaluate until the budget is spent or the space is exhausted."""
        self._resume_or_start()
        budget = self.prepared.config.budget.trials
        free = 0
        while self.evaluated < budget:
            if free >= _FREE_PROPOSALS and self.storage.enqueued == 0:
                if not self._enqueue_unseen():
                    self.storage.set_attribute("exhausted", True)
                    self.listener.on_message("no further point lies within the limits: the space is exhausted")
                    break
                free = 0
            proposal = self.storage.ask(self.prepared.space.dimensions)
            free = 0 if self._take(proposal) else free + 1
        write_reports(Study(self.folder.path))

    def _resume_or_start(self) -> None:
        space, config = self.prepared.space, self.prepared.config
        self.storage.set_attribute("objectives", [entry.name for entry in self.prepared.objectives])
        records = self.storage.records()
        unfinished = self.storage.unfinished()
        if not records and not unfinished and self.storage.enqueued == 0:
            self.storage.set_attribute("facts", _facts(self.prepared))
            enqueue_first_points(
                self.storage,
                space,
                self.prepared.enqueued,
                sampler=config.sampler.name,
                seed=config.sampler.seed,
                trials=config.budget.trials,
            )
        for proposal in unfinished:
            self._give_up(proposal)
        self._check_same_model()
        for record in records:
            self._remember(record)
        if records:
            self.listener.on_message(f"going on with {self.evaluated} of {config.budget.trials} trials done")
            self._restore_reference(records)

    def _check_same_model(self) -> None:
        before = self.storage.attributes.get("facts", {}).get("model_fingerprint")
        now = self.prepared.loaded.fingerprint
        if before is not None and before != now:
            raise StudyError(
                f"{self.folder.path} was begun with model {before}, but {self.prepared.loaded.ref} is {now} now;"
                " choose another `--out`, or pin `model.revision`"
            )

    def _give_up(self, proposal: Proposal) -> None:
        """A killed process left this trial running: mark it, and queue its point again."""
        space = self.prepared.space
        levels = {name: proposal.levels[name] for name in space.dimensions if name in proposal.levels}
        whole = len(levels) == len(space.dimensions)
        point = space.point(levels) if whole else DesignPoint.dense()
        blank = blank_record(proposal.trial, point, self.prepared.loaded.topology, proposal.origin)
        record = dataclasses.replace(blank, state="interrupted", reason="the process was stopped during this trial")
        self.storage.tell(record, None, {})
        if whole:
            self.storage.enqueue(levels, "dense" if proposal.origin == "dense" else "retried")
        elif proposal.origin == "dense":
            self.storage.enqueue(space.dense_levels, "dense")

    def _restore_reference(self, records: list[TrialRecord]) -> None:
        dense = next((r for r in records if r.state == "complete" and not r.point["tensors"]), None)
        if dense is None:
            return
        evaluation = None
        if dense.tasks:
            evaluation = self.folder.read_evaluation(dense.trial)
        self.reference = Reference(evaluation, dense)

    def _remember(self, record: TrialRecord) -> None:
        if record.state in ("complete", "failed"):
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
            reason = ", ".join(f"{name} exceeded by {value:.4g}" for name, value in violations.items() if value > 0)
            self.storage.tell(dataclasses.replace(blank, state="infeasible", reason=reason), None, violations)
            repaired = space.repair(proposal.levels, random.Random(proposal.trial))
            if repaired is not None and space.point(repaired).id not in self.by_point:
                self.storage.enqueue(repaired, "repaired")
            return False
        if point.id in self.by_point:
            self._reuse(blank, self.by_point[point.id], violations)
            return False
        self._evaluate(blank, point, violations)
        return True

    def _reuse(self, blank: TrialRecord, earlier: TrialRecord, violations: dict[str, float]) -> None:
        """A point that was evaluated before: its values are told again, marked as a duplicate."""
        values = objective_values(self.prepared.objectives, earlier) if earlier.state == "complete" else None
        record = dataclasses.replace(
            earlier,
            trial=blank.trial,
            origin=blank.origin,
            state="duplicate",
            duplicate_of=earlier.trial,
            seconds={},
            reason=f"same point as trial {earlier.trial}",
        )
        self.storage.tell(record, values, violations)

    def _evaluate(self, blank: TrialRecord, point: DesignPoint, violations: dict[str, float]) -> None:
        self.listener.on_trial_start(self._progress(), blank)
        logger.info("trial %d: point %s (%s)", blank.trial, blank.point_id, blank.point_text)
        try:
            record, evaluation = self.prepared.evaluator.evaluate(blank, point, self.reference)
        except KeyboardInterrupt:
            self._stop(blank)
            raise
        if record.state == "failed":
            logger.warning("trial %d failed: %s", record.trial, record.reason)
        if point.is_dense and self.reference is None:
            self._check_dense(record)
            self.reference = Reference(evaluation, record)
        if evaluation is not None:
            self.folder.write_evaluation(record.trial, evaluation)
        values = objective_values(self.prepared.objectives, record) if record.state == "complete" else None
        self.storage.tell(record, values, violations)
        if values is not None and "reference" not in self.storage.attributes:
            dense = dict(zip((o.name for o in self.prepared.objectives), values, strict=True))
            self.storage.set_attribute("reference", reference_point(self.prepared.objectives, dense))
        self._remember(record)
        self.evaluated_here += 1
        study = Study(self.folder.path)
        study.write_tables()
        logger.info("trial %d: %s %s", record.trial, record.state, record.quantities)
        self.listener.on_trial_end(self._progress(study), record)

    def _check_dense(self, record: TrialRecord) -> None:
        """Without the dense model there is nothing to compare with: say why it failed and end."""
        if record.state == "failed":
            self._stop(record)
            raise StudyError(f"the dense model (trial {record.trial}) must be measurable, but: {record.reason}")

    def _stop(self, blank: TrialRecord) -> None:
        interrupted = dataclasses.replace(blank, state="interrupted", reason=blank.reason or "stopped by the user")
        self.storage.tell(interrupted, None, {})
        levels = self.prepared.space.levels_of(DesignPoint.from_json(blank.point, self.prepared.loaded.topology))
        self.storage.enqueue(levels, "dense" if blank.origin == "dense" else "retried")
        study = Study(self.folder.path)
        study.write_tables()

    def _enqueue_unseen(self) -> bool:
        generator = random.Random(len(self.storage.records()))
        levels = unseen_feasible_levels(self.prepared.space, set(self.by_point), generator)
        if levels is None:
            return False
        self.storage.enqueue(levels, "repaired")
        return True

    def _progress(self, study: Study | None = None) -> StudyProgress:
        total = self.prepared.config.budget.trials
        left = None
        if self.evaluated_here:
            left = (time.monotonic() - self.begun_s) / self.evaluated_here * (total - self.evaluated)
        front, hypervolume = (study.front_size, study.hypervolume) if study else (0, None)
        return StudyProgress(self.evaluated, total, front, hypervolume, left)


def _facts(prepared: PreparedStudy) -> dict[str, object]:
    """What is written once per study."""
    calibration = prepared.calibration
    return {
        "environment": describe_environment(),
        "model_fingerprint": prepared.loaded.fingerprint,
        "model_ref": prepared.loaded.ref,
        "architecture": prepared.loaded.topology.architecture,
        "parameters_dense": prepared.loaded.topology.parameters_dense,
        "device": str(prepared.loaded.device),
        "dtype": str(prepared.loaded.dtype).removeprefix("torch."),
        "calibration": None if calibration is None else calibration.description,
        "calibration_fingerprint": None if calibration is None else calibration.fingerprint,
        "evaluation_fingerprint": prepared.evaluator.evaluator.fingerprint if prepared.evaluator.evaluator else None,
        "energy_meter": prepared.evaluator.meter.name if prepared.evaluator.meter else None,
        "seeds": {
            "sampler": prepared.config.sampler.seed,
            "documents": prepared.config.evaluation.seed,
            "calibration": prepared.config.calibration.seed,
        },
        "number_of_points": str(prepared.space.number_of_points()),
    }
