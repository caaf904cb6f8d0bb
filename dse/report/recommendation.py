"""The recommended point of a study, with its reason: the cheapest whose accuracy drop is within a tolerance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dse.errors import ConfigError, StudyError
from dse.evaluation.statistics.power import documents_to_settle
from dse.pareto.choice import SLACK, Candidates, choose_point
from dse.pareto.knee import knee_index
from dse.pareto.objective import OBJECTIVES, Objective, directions_of
from dse.report.trials_table import (
    change,
    dense_row,
    front_table,
    interval,
    is_eligible,
    is_predicted,
    is_true,
    number,
    objective_matrix,
    require_columns,
)
from dse.report.units import percent, points

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True)
class Recommendation:
    """The recommended point, or why there is none; JSON-safe through `dataclasses.asdict`.

    Attributes:
        trial: The recommended trial: `bound_trial`, otherwise `estimate_trial`; None if no trial fits.
        point_id: Its design point.
        reason: A sentence or two with the figures.
        reduction: Fraction of the parameters removed.
        cost_ratio: Geometric mean of its costs as ratios to dense; below 1 it saves.
        accuracy_drop: Dense accuracy minus its own, as a fraction; positive is a loss.
        accuracy_drop_low: Lower end of the drop's 95 % interval; None if unknown.
        accuracy_drop_high: Upper end.
        meets_bound: Whether the upper end is within the tolerance; false if unknown.
        bound_trial: The cheapest trial whose upper end is within the tolerance; None if there is none.
        estimate_trial: The cheapest trial whose drop is within the tolerance by point estimate.
        nearest_miss_trial: If no trial fits, the one that misses the limits by the least.
        nearest_miss_reason: Which limits it misses; "" if there is none.
        near_miss_trial: A trial that more documents would settle: `estimate_trial` if its upper end is beyond the
            tolerance, or a nearest miss whose lower end is within it; None if there is none.
        documents_to_settle: Total number of documents that would settle it if its drop stays as estimated; None if
            unknown.
        more_documents: `documents_to_settle` minus the documents evaluated so far.
        knee_trial: The knee of the front, independent of the tolerance; None if only dense is on the front.
    """

    trial: int | None
    point_id: str | None
    reason: str
    reduction: float | None = None
    cost_ratio: float | None = None
    accuracy_drop: float | None = None
    accuracy_drop_low: float | None = None
    accuracy_drop_high: float | None = None
    meets_bound: bool = False
    bound_trial: int | None = None
    estimate_trial: int | None = None
    nearest_miss_trial: int | None = None
    nearest_miss_reason: str = ""
    near_miss_trial: int | None = None
    documents_to_settle: int | None = None
    more_documents: int | None = None
    knee_trial: int | None = None


@dataclass(frozen=True)
class _Limits:
    """What a recommended point must satisfy, as fractions."""

    max_accuracy_drop: float
    min_reduction: float | None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_accuracy_drop) and self.max_accuracy_drop >= 0):
            raise ConfigError(
                f"the largest accuracy drop must be a number >= 0, but got {self.max_accuracy_drop};"
                " give a fraction, such as 0.02 for two percentage points"
            )
        if self.min_reduction is not None and not 0 <= self.min_reduction < 1:
            raise ConfigError(
                f"`min_reduction` must be in [0, 1), but got {self.min_reduction}; give a fraction, such as 0.1"
            )

    def __str__(self) -> str:
        text = f"an accuracy drop of {100 * self.max_accuracy_drop:g} pts"
        return f"{text} and a reduction of at least {percent(self.min_reduction)}" if self.min_reduction else text


@dataclass(frozen=True)
class _Candidate:
    """A complete, feasible trial that decomposes something; `ratios` holds its costs by name."""

    trial: int
    point_id: str
    reduction: float
    drop: float
    ends: tuple[float, float] | None
    ratios: tuple[tuple[str, float], ...]
    documents: int | None

    def documents_to_settle(self, tolerance: float) -> int | None:
        """Total documents at which the interval would exclude the tolerance if the drop stays as estimated."""
        if self.ends is None or self.documents is None:
            return None
        end = self.ends[1] if self.drop <= tolerance else self.ends[0]
        return documents_to_settle(self.drop, end, tolerance, self.documents)


def recommend(
    trials: pd.DataFrame,
    objectives: Sequence[Objective],
    *,
    max_accuracy_drop: float,
    min_reduction: float | None = None,
) -> Recommendation:
    """Recommend the cheapest trial whose accuracy drop from the dense model is within tolerance.

    A trial fits if its drop is at most `max_accuracy_drop`, its reduction at least `min_reduction`, and at least one of
    its costs below dense; the dense model is never recommended. The cheapest trial whose upper 95 % bound is within the
    tolerance is recommended. If there is none, the cheapest that fits by its point estimate is, reported as not
    certified, with the number of documents that would settle it. If that does not exist either, the nearest miss is
    named. Cheapest means the smallest geometric mean of the ratios to dense over the study's cost objectives (latency,
    energy, size), or over the parameters if it has none. Ties go to the smaller drop, then to the earlier trial.

    Args:
        max_accuracy_drop: Largest accuracy drop, as a fraction: 0.02 is two percentage points.
        min_reduction: Smallest fraction of the parameters to remove.

    Raises:
        ConfigError: A limit lies outside its interval, or the study did not measure accuracy.
        StudyError: The dense model has not been measured.
    """
    limits = _Limits(max_accuracy_drop, min_reduction)
    require_columns(trials, ("trial", "state", "feasible", "point_id", "reduction", "decomposed_tensors"))
    if "accuracy" not in trials.columns:
        raise ConfigError(
            "a recommendation needs accuracy, but this study did not measure it; add 'accuracy' to its objectives"
        )
    dense = dense_row(trials)
    if dense is None:
        raise StudyError("the dense model (trial 0) must be complete for a comparison, but is not; resume the study")
    candidates = _candidates(trials.sort_values("trial"), dense, objectives)
    knee = _knee_trial(trials, objectives)
    if not candidates:
        reason = f"No trial fits within {limits}: no decomposed trial is complete, feasible and measured in every cost."
        return Recommendation(None, None, reason, knee_trial=knee)
    arrays = _arrays(candidates)
    choice = choose_point(arrays, max_accuracy_drop, min_reduction or 0.0)
    estimate = candidates[choice.best]
    if not choice.fits:
        advice = _nothing_fits(estimate, bool(arrays.saves[choice.best]), limits)
        return dataclasses.replace(advice, knee_trial=knee)
    index = choice.best if choice.certified is None else choice.certified
    best = candidates[index]
    advice = Recommendation(
        trial=best.trial,
        point_id=best.point_id,
        reason=_reason(best, estimate, choice.certified is not None, limits),
        reduction=best.reduction,
        cost_ratio=float(arrays.cost[index]),
        accuracy_drop=best.drop,
        accuracy_drop_low=None if best.ends is None else best.ends[0],
        accuracy_drop_high=None if best.ends is None else best.ends[1],
        meets_bound=choice.certified is not None,
        bound_trial=None if choice.certified is None else best.trial,
        estimate_trial=estimate.trial,
        knee_trial=knee,
    )
    return advice if choice.best == choice.certified else _with_near_miss(advice, estimate, limits)


def _candidates(trials: pd.DataFrame, dense: pd.Series, objectives: Sequence[Objective]) -> list[_Candidate]:
    costs = [objective for objective in objectives if objective.is_cost]
    candidates = []
    for _, row in trials[is_eligible(trials)].iterrows():
        gain, reduction = change(row, dense, OBJECTIVES["accuracy"]), number(row, "reduction")
        if number(row, "decomposed_tensors") == 0 or gain is None or reduction is None:
            continue
        ratios = _cost_ratios(row, dense, costs) if costs else (("parameters", 1.0 - reduction),)
        documents = number(row, "accuracy_drop_documents")
        if ratios is not None:
            candidates.append(
                _Candidate(
                    trial=int(row["trial"]),
                    point_id=str(row["point_id"]),
                    reduction=reduction,
                    drop=-gain[0],
                    ends=interval(row, "accuracy_drop"),
                    ratios=ratios,
                    documents=None if documents is None else int(documents),
                )
            )
    return candidates


def _cost_ratios(row: pd.Series, dense: pd.Series, costs: Sequence[Objective]) -> tuple[tuple[str, float], ...] | None:
    """Each cost objective as a ratio to dense; None if one was not measured, since their mean is then undefined."""
    ratios = []
    for objective in costs:
        ratio = change(row, dense, objective)
        if ratio is None or ratio[0] <= 0:
            return None
        mark = "predicted " if is_predicted(row, objective.name) else ""
        if objective.direction == "maximize":  # a higher throughput is a lower cost
            ratios.append((f"{mark}inverse {objective.label.lower()}", 1 / ratio[0]))
        else:
            ratios.append((mark + objective.label.lower(), ratio[0]))
    return tuple(ratios)


def _arrays(candidates: Sequence[_Candidate]) -> Candidates:
    return Candidates(
        drop=np.array([c.drop for c in candidates]),
        drop_high=np.array([np.nan if c.ends is None else c.ends[1] for c in candidates]),
        reduction=np.array([c.reduction for c in candidates]),
        cost_ratios=np.array([[ratio for _, ratio in c.ratios] for c in candidates]),
    )


def _knee_trial(trials: pd.DataFrame, objectives: Sequence[Objective]) -> int | None:
    front = front_table(trials, objectives)
    if front.empty:
        return None
    # The dense model is an extreme of the front but cannot be its knee.
    index = knee_index(objective_matrix(front, objectives), directions_of(objectives), ~is_true(front, "is_dense"))
    return None if index is None else int(front["trial"].iloc[index])


def _with_near_miss(advice: Recommendation, near_miss: _Candidate, limits: _Limits) -> Recommendation:
    if near_miss.ends is None:
        return advice
    needed = near_miss.documents_to_settle(limits.max_accuracy_drop)
    more = None if needed is None or near_miss.documents is None else needed - near_miss.documents
    return dataclasses.replace(advice, near_miss_trial=near_miss.trial, documents_to_settle=needed, more_documents=more)


def _nothing_fits(nearest: _Candidate, saves: bool, limits: _Limits) -> Recommendation:
    """No recommendation: the nearest miss and the limits that it misses."""
    excess = nearest.drop - limits.max_accuracy_drop
    misses = []
    if excess > SLACK:
        misses.append(f"{_drop_text(nearest)}, {points(excess, 2).lstrip('+')} over the tolerance")
    if limits.min_reduction is not None and nearest.reduction < limits.min_reduction - SLACK:
        misses.append(f"removes only {percent(nearest.reduction)} of the parameters")
    if not saves:
        misses.append(f"saves nothing ({_ratios_text(nearest)} of dense)")
    why = " and ".join(misses)
    is_undecided = len(misses) == 1 and excess > 0 and nearest.ends is not None and (
        nearest.ends[0] <= limits.max_accuracy_drop < nearest.ends[1]
    )  # fmt: skip
    settle = _settle_text(nearest, limits) if is_undecided else ""
    advice = Recommendation(
        trial=None,
        point_id=None,
        reason=f"No trial fits within {limits}; the nearest miss, trial {nearest.trial}, {why}{settle}.",
        nearest_miss_trial=nearest.trial,
        nearest_miss_reason=f"it {why}",
    )
    return _with_near_miss(advice, nearest, limits) if is_undecided else advice


def _reason(best: _Candidate, estimate: _Candidate, is_certified: bool, limits: _Limits) -> str:
    how = "trial whose 95 % upper bound is" if is_certified else "by point estimate"
    text = (
        f"Trial {best.trial} is the cheapest {how} within {limits} ({_cost_text(best)}); it removes"
        f" {percent(best.reduction)} of the parameters and {_drop_text(best)}"
    )
    if best.ends is None:
        return f"{text}; the confidence interval is unknown."
    if not is_certified:
        return (
            f"{text}. It is not certified: no trial's upper bound is within the tolerance{_settle_text(best, limits)}."
        )
    if estimate is best:
        return f"{text}. It is also the cheapest by point estimate."
    return (
        f"{text}. By point estimate, trial {estimate.trial} is cheaper ({_cost_text(estimate)}): it"
        f" {_drop_text(estimate)}{_settle_text(estimate, limits)}."
    )


def _cost_text(candidate: _Candidate) -> str:
    if len(candidate.ratios) == 1:
        return f"{_ratios_text(candidate)} of dense"
    mean = float(_arrays([candidate]).cost[0])
    return f"x{mean:.2f} of dense, the geometric mean of {_ratios_text(candidate)}"


def _ratios_text(candidate: _Candidate) -> str:
    return " and ".join(f"{name} x{ratio:.2f}" for name, ratio in candidate.ratios)


def _settle_text(candidate: _Candidate, limits: _Limits) -> str:
    """The number of documents that would show on which side of the tolerance the drop lies; "" if unknown."""
    needed = candidate.documents_to_settle(limits.max_accuracy_drop)
    if needed is None or candidate.documents is None:
        return ""
    more = needed - candidate.documents
    return f"; about {more:,} more documents ({needed:,} in total) would settle it if the drop stays as estimated"


def _drop_text(candidate: _Candidate) -> str:
    verb = "loses" if candidate.drop >= 0 else "gains"
    text = f"{verb} {points(abs(candidate.drop), 2).lstrip('+')} of accuracy"
    if candidate.ends is None:
        return text
    low, high = (points(end, 2).removesuffix(" pts") for end in candidate.ends)
    return f"{text} (95 % interval of the drop {low} to {high} pts)"
