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
    """Tests between trials; outcomes are read when first asked for and kept for the process."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder

    def differs(self, objective: str, first: int, second: int) -> bool | None:
        """Whether two trials differ significantly in a quality; None where their outcomes do not say."""
        try:
            before, after = (_read(self._folder, trial) for trial in (first, second))
            if objective == "accuracy":
                p_value = _p_value(after.accuracy_drop(before))
            elif objective == "perplexity":
                p_value = _p_value(after.perplexity_ratio(before))
            elif objective in GRADED_METRICS:
                p_value = _p_value(after.graded_drop(objective, before))
            else:
                return None
        except (UserError, OSError):  # missing, damaged or of other documents: the table must still be made
            return None
        return None if p_value is None else p_value < SIGNIFICANCE_LEVEL


def _p_value(paired: PairedInterval | None) -> float | None:
    return None if paired is None else paired.p_value


def _read(folder: StudyFolder, trial: int) -> EvaluationResult:
    written_ns = folder.outcomes(trial).stat().st_mtime_ns
    return _read_once(folder.path.resolve(), trial, written_ns)


@functools.lru_cache(maxsize=256)
def _read_once(path: Path, trial: int, written_ns: int) -> EvaluationResult:
    """A running study marks ties after every trial; a file that was written anew has another time."""
    return StudyFolder(path).read_evaluation(trial)
