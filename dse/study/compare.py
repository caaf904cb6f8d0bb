"""Two trials of a study side by side: quality paired by document, costs as ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dse.errors import StudyError
from dse.evaluation.comparison import Comparison, compare_divergences, compare_evaluations
from dse.pareto import OBJECTIVES
from dse.study.folder import StudyFolder
from dse.trial_record import Interval, TrialRecord

__all__ = ["CostComparison", "TrialComparison", "compare_records"]


@dataclass(frozen=True)
class CostComparison:
    """One cost of two trials.

    Attributes:
        name: Objective it is, such as `decode_latency_s`.
        unit: SI.
        first: Value of the first trial.
        second: Value of the second.
        ratio: Second over first.
        low: Lower end of its 95 % interval; None for exact figures and where none is known.
        high: Upper end.
        is_predicted: Whether one of the two was not measured but predicted.
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
    """What tells two trials apart; every change is the second against the first.

    Attributes:
        first: Trial whose values stand for the first one asked for: a duplicate's are those of the trial it repeats.
        second: Likewise.
        first_point: Design point of the first.
        second_point: Of the second.
        quality: Tasks and means, paired by document, and the KL divergence, paired by window; empty where the study
            measures none.
        costs: Parameters, bytes, and whatever was measured.
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
        folder: Of their study; holds the per-document outcomes.
        first: What the changes refer to; its trial is the one that was evaluated, not a repetition.
        second: Another one.

    Raises:
        StudyError: They are the same trial, or their outcomes are missing or damaged.
        TaskError: They were evaluated on other documents.
    """
    if first.trial == second.trial:
        raise StudyError(f"two trials must differ to compare, but both are trial {first.trial}; name another one")
    quality: tuple[Comparison, ...] = ()
    if first.tasks and second.tasks:
        quality = compare_evaluations(folder.read_evaluation(first.trial), folder.read_evaluation(second.trial))
    if first.divergence_windows and second.divergence_windows:
        quality = (*quality, compare_divergences(first.divergence_windows, second.divergence_windows))
    costs = [_cost_of(name, first, second) for name, entry in OBJECTIVES.items() if entry.is_cost]
    return TrialComparison(
        first=first.trial,
        second=second.trial,
        first_point=first.point_id,
        second_point=second.point_id,
        quality=quality,
        costs=tuple(cost for cost in costs if cost is not None),
    )


def _cost_of(name: str, first: TrialRecord, second: TrialRecord) -> CostComparison | None:
    before, after = _value(name, first), _value(name, second)
    if before is None or after is None or before <= 0:
        return None
    ratios = first.ratios.get(name), second.ratios.get(name)
    low = high = None
    if ratios[0] is not None and ratios[1] is not None:
        low, high = _ends_of_ratio(ratios[0], ratios[1])
    is_predicted = name in (*first.predicted, *second.predicted)
    return CostComparison(name, OBJECTIVES[name].unit, before, after, after / before, low, high, is_predicted)


def _value(name: str, record: TrialRecord) -> float | None:
    measured = record.quantities.get(name)
    return record.cost.get(name) if measured is None else measured.value


def _ends_of_ratio(first: Interval, second: Interval) -> tuple[float | None, float | None]:
    """Interval of second / first from two independent ratios to dense: MOVER in the logarithm (Zou and Donner 2008)."""
    ends = [first.value, first.low, first.high, second.value, second.low, second.high]
    if any(end is None or end <= 0 for end in ends):
        return None, None
    a, a_low, a_high, b, b_low, b_high = (math.log(end) for end in ends if end is not None)
    below, above = math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)
    return math.exp(b - a - below), math.exp(b - a + above)
