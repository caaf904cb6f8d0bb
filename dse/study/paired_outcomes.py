"""Paired tests between any two trials of a study, from the outcomes that are kept with them."""

from __future__ import annotations

import functools
from pathlib import Path

from dse.errors import UserError
from dse.evaluation import GRADED_METRICS, EvaluationResult, PairedInterval
from dse.study.folder import StudyFolder

__all__ = ["SIGNIFICANCE_LEVEL", "PairedOutcomes"]

SIGNIFICANCE_LEVEL = 0.05


class PairedOutcomes:
    """Tests between trials. A running study marks ties after every trial, so the process remembers their results."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder

    def differs(self, objective: str, first: int, second: int) -> bool | None:
        """Whether two trials differ significantly in a quality; None where their outcomes do not say."""
        try:
            p_value = _p_value(self._folder.path.resolve(), objective, self._version(first), self._version(second))
        except (UserError, OSError):  # missing, damaged or of other documents: the table must still be made
            return None
        return None if p_value is None else p_value < SIGNIFICANCE_LEVEL

    def _version(self, trial: int) -> tuple[int, int]:
        """The trial, and when its outcomes were written: a file that was written anew is read anew."""
        return trial, self._folder.outcomes(trial).stat().st_mtime_ns


@functools.lru_cache(maxsize=50_000)
def _p_value(path: Path, objective: str, first: tuple[int, int], second: tuple[int, int]) -> float | None:
    before, after = _read(path, first), _read(path, second)
    paired: PairedInterval | None = None
    if objective == "accuracy":
        paired = after.accuracy_drop(before)
    elif objective == "perplexity":
        paired = after.perplexity_ratio(before)
    elif objective in GRADED_METRICS:
        paired = after.graded_drop(objective, before)
    return None if paired is None else paired.p_value


@functools.lru_cache(maxsize=256)
def _read(path: Path, version: tuple[int, int]) -> EvaluationResult:
    return StudyFolder(path).read_evaluation(version[0])
