"""Heal the point of a trial, and evaluate it again: its record's values after healing, beside those before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dse.config import HealingConfig, StudyConfig
from dse.decomposition import FactorBank, decompose, longest_window
from dse.errors import TrialError
from dse.evaluation import EvaluationResult, ModelEvaluator
from dse.evaluation.divergence import DenseDivergence
from dse.files import cache_dir
from dse.healing import HealingSettings, Teacher, apply_healed, heal, healing_windows, windows_of_other_text
from dse.measurement import device_in_use
from dse.models import LoadedModel
from dse.progress import ProgressCallback
from dse.trial.rungs import with_evaluation
from dse.trial_record import TrialRecord

__all__ = ["TrialHealer", "healing_settings"]


def healing_settings(config: HealingConfig) -> HealingSettings:
    """The settings of a training from the section of a study file."""
    return HealingSettings(
        tokens=config.tokens,
        minutes=config.minutes,
        batch_tokens=config.batch_tokens,
        learning_rate=None if config.learning_rate == "auto" else float(config.learning_rate),
        seed=config.seed,
    )


class TrialHealer:
    """Heals points of one study on a resident model, which is dense before and after.

    The dense model's states on the training text and on text of another source are computed once, for all points.
    """

    def __init__(
        self,
        config: StudyConfig,
        healing: HealingConfig,
        loaded: LoadedModel,
        bank: FactorBank,
        evaluator: ModelEvaluator | None,
        progress: ProgressCallback,
    ) -> None:
        """Read the texts and run the dense model over them.

        Args:
            config: The study.
            healing: How to train.
            loaded: The model.
            bank: Source of the points' factors.
            evaluator: Evaluates the tasks before and after; None if the study has none.
            progress: Progress callback.

        Raises:
            CalibrationError: A text cannot be read or is too short.
            ModelError: The model has no output head whose inputs suffice for the loss.
        """
        self._loaded, self._bank, self._evaluator, self._progress = loaded, bank, evaluator, progress
        self._settings = healing_settings(healing)
        longest = longest_window(loaded.model)
        text = healing.text or config.calibration
        windows = healing_windows(loaded.tokenizer, text, healing.tokens, longest_window=longest)
        other = windows_of_other_text(
            loaded.tokenizer, healing.other_tokens, file=healing.other_text, longest_window=longest
        )
        with device_in_use(loaded.device):
            self._teacher = Teacher(loaded.model, windows, cache_dir(), progress=progress)
            self._other = DenseDivergence(loaded.model, other, progress=progress)
        self._dense: EvaluationResult | None = None

    def heal(self, record: TrialRecord, folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Train the point of a record, and evaluate it with the trained weights.

        Args:
            record: The record of a complete trial.
            folder: Where the state of the training is kept, so that a killed one continues.

        Returns:
            The entry: `quantities`, `ratios` and `accuracy_drop` after healing, `before` with quantities from before,
            the `report` of the training, and the `reason` of a failure ("" without one). And the trained weights.
        """
        loaded = self._loaded
        try:
            dense = self._dense_result()
            with device_in_use(loaded.device), decompose(loaded, record.point, self._bank) as applied:
                before = self._other.measure().interval
                found = heal(
                    loaded,
                    applied,
                    self._teacher,
                    self._other,
                    self._settings,
                    folder=folder,
                    progress=self._progress,
                )
                apply_healed(applied, loaded.model, found.weights)
                bare = dataclasses.replace(record, quantities={}, ratios={}, graded_drops={}, accuracy_drop=None)
                if dense is not None:
                    bare = with_evaluation(bare, self._evaluate(), dense)
                after = {**bare.quantities, "kl_divergence_other": self._other.measure().interval}
        except TrialError as error:
            return _entry({}, {}, None, {}, {}, str(error)), {}
        report = found.report.to_json()
        return _entry(
            after, bare.ratios, bare.accuracy_drop, {"kl_divergence_other": before}, report, ""
        ), found.weights

    def _dense_result(self) -> EvaluationResult | None:
        if self._dense is None and self._evaluator is not None:
            with device_in_use(self._loaded.device):
                self._dense = self._evaluate()
        return self._dense

    def _evaluate(self) -> EvaluationResult:
        assert self._evaluator is not None  # noqa: S101 - checked by the callers
        return self._evaluator.evaluate(lambda done, total: self._progress("evaluate", done, total))


def _entry(
    quantities: Mapping[str, Any],
    ratios: Mapping[str, Any],
    accuracy_drop: Any,
    before: Mapping[str, Any],
    report: Mapping[str, Any],
    reason: str,
) -> dict[str, Any]:
    def plain(intervals: Mapping[str, Any]) -> dict[str, Any]:
        return {name: dataclasses.asdict(interval) for name, interval in intervals.items()}

    return {
        "quantities": plain(quantities),
        "ratios": plain(ratios),
        "accuracy_drop": None if accuracy_drop is None else dataclasses.asdict(accuracy_drop),
        "before": plain(before),
        "report": dict(report),
        "reason": reason,
    }
