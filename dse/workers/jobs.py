"""Jobs of workers: everything that needs the model. The driver submits a job and stores what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dse.evaluation import EvaluationResult
from dse.measurement import IdlePower
from dse.search.multi_fidelity import EarlyStopping
from dse.trial.trial_evaluator import TrialPart
from dse.trial_record import EvaluatedTrial, TrialRecord
from dse.workers.float32_comparison import compare_with_float32
from dse.workers.listener import StudyListener
from dse.workers.setup import PreparedStudy

__all__ = [
    "CompareFloat32",
    "EvaluateFinal",
    "EvaluateTrial",
    "HealPoint",
    "Job",
    "MeasureIdle",
    "MeasureOtherText",
    "TrialResult",
]


class Job(Protocol):
    """A frozen value that a worker runs on its resident model."""

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> Any:
        """Run on the model of `prepared`, which is dense before and after."""


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        record: The finished record.
        evaluation: The evaluation with its per-document outcomes; None if not all documents were evaluated.
    """

    record: TrialRecord
    evaluation: EvaluationResult | None


@dataclass(frozen=True)
class EvaluateTrial:
    """Evaluate and measure a design point.

    Attributes:
        record: A new record: number, point, origin and cost.
        baseline: The dense model's trial; None while it is itself evaluated.
        rule: Stops a trial of too little promise; None evaluates every trial to the end.
        idle: The device's idle power, for net energy.
        part: What to take; see `TrialEvaluator.evaluate`.
    """

    record: TrialRecord
    baseline: EvaluatedTrial | None = None
    rule: EarlyStopping | None = None
    idle: IdlePower | None = None
    part: TrialPart = "all"

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> TrialResult:
        """Evaluate the point; a failure is recorded, not raised."""
        found = prepared.evaluator.evaluate(self.record, self.baseline, self.rule, self.idle, self.part)
        return TrialResult(*found)


@dataclass(frozen=True)
class EvaluateFinal:
    """Evaluate the point of a record on the study's final documents."""

    record: TrialRecord

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> EvaluationResult:
        """Evaluate the point.

        Raises:
            TrialError: The point cannot be applied or scored.
        """
        if prepared.final is None:
            raise ValueError("a study without final documents has no final evaluation")
        return prepared.final.evaluate(
            self.record, lambda done, total: listener.on_phase("evaluate the front", done, total)
        )


@dataclass(frozen=True)
class HealPoint:
    """Train the point of a record, and evaluate it again.

    Attributes:
        record: The record of a complete trial.
        folder: Where the state of the training is kept.
    """

    record: TrialRecord
    folder: str

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """The entry of `TrialHealer.heal`, and the trained weights; a failure is part of the entry, not raised."""
        return prepared.healer.heal(self.record, Path(self.folder))


@dataclass(frozen=True)
class MeasureOtherText:
    """Compare the point of a record with the dense model on text of another source than the calibration's."""

    record: TrialRecord

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> dict[str, Any]:
        """The divergences; see `OtherText.measure`."""
        return prepared.other_text.measure(self.record)


@dataclass(frozen=True)
class MeasureIdle:
    """Measure the idle power of the worker's device."""

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> IdlePower | None:
        """The idle power; None without a meter."""
        return prepared.plan.measure_idle(prepared.loaded.device)


@dataclass(frozen=True)
class CompareFloat32:
    """Compare the dense model in half precision with the model in float32.

    Attributes:
        evaluation: The dense model's evaluation.
    """

    evaluation: EvaluationResult | None

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> dict[str, Any] | None:
        """The differences, JSON-safe; None where they are not wanted or memory does not suffice."""
        return compare_with_float32(prepared.config, prepared.loaded, self.evaluation, listener)
