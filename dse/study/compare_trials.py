"""Compare trials of a study: quality by paired tests over the same documents, costs as ratios."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from dse.errors import StudyError, UserError
from dse.evaluation import GRADED_METRICS, EvaluationResult
from dse.evaluation.paired_comparison import Comparison, compare_divergences, compare_evaluations
from dse.evaluation.statistics.intervals import Interval, PairedInterval
from dse.pareto import OBJECTIVES
from dse.study.folder import StudyFolder
from dse.trial_record import TrialRecord

__all__ = ["SIGNIFICANCE_LEVEL", "CostComparison", "PairedOutcomes", "TrialComparison", "compare_records"]

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class CostComparison:
    """One cost of two trials.

    Attributes:
        name: The objective, such as `decode_latency_s`.
        unit: SI unit.
        first: Value of the first trial.
        second: Value of the second trial.
        ratio: Second over first.
        low: Lower bound of the ratio's 95 % interval; None for exact costs and unknown spreads.
        high: Upper bound.
        is_predicted: Whether at least one of the values was predicted instead of measured.
    """

    name: str
    unit: str
    first: float
    second: float
    ratio: float
    low: float | None = None
    high: float | None = None
    is_predicted: bool = False


@dataclass(frozen=True)
class TrialComparison:
    """The differences between two trials; every change is the second relative to the first.

    Attributes:
        first: The first trial; a duplicate is replaced by the trial whose values it repeats.
        second: The second trial, likewise.
        first_point: Id of the first design point.
        second_point: Id of the second design point.
        quality: Tasks and means, paired by document, and the KL divergence, paired by window.
        costs: Parameters, bytes, and the measured costs.
    """

    first: int
    second: int
    first_point: str
    second_point: str
    quality: tuple[Comparison, ...]
    costs: tuple[CostComparison, ...]


def compare_records(folder: StudyFolder, first: TrialRecord, second: TrialRecord) -> TrialComparison:
    """Compare two complete trials.

    Args:
        folder: The study's folder, with the per-document outcomes.
        first: The trial that changes refer to; not a duplicate.
        second: Another trial; not a duplicate.

    Raises:
        StudyError: Both are the same trial, or their outcomes are missing or damaged.
        TaskError: They were evaluated on different documents.
    """
    if first.trial == second.trial:
        raise StudyError(f"two trials must differ to compare, but both are trial {first.trial}; name another one")
    quality: tuple[Comparison, ...] = ()
    if first.tasks and second.tasks:
        quality = compare_evaluations(folder.read_evaluation(first.trial), folder.read_evaluation(second.trial))
    if first.divergence_windows and second.divergence_windows:
        quality = (*quality, compare_divergences(first.divergence_windows, second.divergence_windows))
    costs = [_cost_comparison(name, first, second) for name, objective in OBJECTIVES.items() if objective.is_cost]
    return TrialComparison(
        first=first.trial,
        second=second.trial,
        first_point=first.point_id,
        second_point=second.point_id,
        quality=quality,
        costs=tuple(cost for cost in costs if cost is not None),
    )


def _cost_comparison(name: str, first: TrialRecord, second: TrialRecord) -> CostComparison | None:
    before, after = first.value(name), second.value(name)
    if before is None or after is None or before <= 0:
        return None
    ratios = first.ratios.get(name), second.ratios.get(name)
    low = high = None
    if ratios[0] is not None and ratios[1] is not None:
        low, high = _ratio_bounds(ratios[0], ratios[1])
    is_predicted = name in (*first.predicted, *second.predicted)
    return CostComparison(name, OBJECTIVES[name].unit, before, after, after / before, low, high, is_predicted)


def _ratio_bounds(first: Interval, second: Interval) -> tuple[float | None, float | None]:
    """Interval of second / first from two independent ratios to the baseline.

    Source: MOVER (Zou and Donner 2008), applied to the logarithms.
    """
    ends = [first.value, first.low, first.high, second.value, second.low, second.high]
    if any(end is None or end <= 0 for end in ends):
        return None, None
    a, a_low, a_high, b, b_low, b_high = (math.log(end) for end in ends if end is not None)
    below, above = math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)
    return math.exp(b - a - below), math.exp(b - a + above)


class PairedOutcomes:
    """Significance tests between trials, cached in memory: a running study marks ties after every trial."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder

    def differs(self, objective: str, first: int, second: int) -> bool | None:
        """Whether two trials differ significantly in a quality; None if their outcomes cannot be compared."""
        try:
            p_value = _p_value(self._folder.path.resolve(), objective, self._version(first), self._version(second))
        except (UserError, OSError):  # missing, damaged or other documents: the table is still made
            return None
        return None if p_value is None else p_value < SIGNIFICANCE_LEVEL

    def _version(self, trial: int) -> tuple[int, int]:
        """The trial and the time its outcomes were written, so that a rewritten file is read again."""
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
