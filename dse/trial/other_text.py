"""Divergence on text like the calibration's and on text of another source: does a point generalise?"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from dse.config import CalibrationConfig
from dse.decomposition import FactorBank, decompose, held_out_windows, longest_window
from dse.errors import CalibrationError, ModelError, TrialError
from dse.evaluation.divergence import DenseDivergence
from dse.healing import windows_of_other_text
from dse.measurement import device_in_use
from dse.models import LoadedModel
from dse.trial_record import TrialRecord

__all__ = ["OtherText", "other_text_ratio"]

logger = logging.getLogger("dse")

_TOKENS = 512
"""Of each text. The figures are read as a median over points, and the comparison must not lengthen a study."""


class OtherText:
    """Compares points with the dense model on both texts.

    Args:
        loaded: The model, dense before and after.
        bank: Source of the points' factors.
        calibration: The study's calibration text.
    """

    def __init__(self, loaded: LoadedModel, bank: FactorBank, calibration: CalibrationConfig) -> None:
        self._loaded, self._bank, self._calibration = loaded, bank, calibration

    def measure(self, record: TrialRecord) -> dict[str, Any]:
        """The divergences of a record's point.

        Returns:
            `own` and `other`, intervals as JSON mappings; or the `reason` why they cannot be measured, for example that
            the model has no output head for text.
        """
        try:
            with device_in_use(self._loaded.device):
                own, other = self._dense
                with decompose(self._loaded, record.point, self._bank):
                    found = {"own": own.measure().interval, "other": other.measure().interval}
        except (CalibrationError, ModelError, TrialError) as error:
            logger.warning("trial %d is not compared on text of another source: %s", record.trial, error)
            return {"reason": str(error)}
        return {name: dataclasses.asdict(interval) for name, interval in found.items()}

    @cached_property
    def _dense(self) -> tuple[DenseDivergence, DenseDivergence]:
        tokenizer, longest = self._loaded.tokenizer, longest_window(self._loaded.model)
        own = held_out_windows(tokenizer, self._calibration, _TOKENS, longest_window=longest)
        other = windows_of_other_text(tokenizer, _TOKENS, longest_window=longest)
        return DenseDivergence(self._loaded.model, own), DenseDivergence(self._loaded.model, other)


def other_text_ratio(found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Median over points of the divergence on the other text relative to that on the study's own; None without any.

    Args:
        found: Trial number to the result of `OtherText.measure`.
    """
    ratios = [
        entry["other"]["value"] / entry["own"]["value"]
        for entry in found.values()
        if "own" in entry and entry["own"]["value"] > 0
    ]
    return statistics.median(ratios) if ratios else None
