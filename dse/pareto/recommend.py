"""Which point of a study to take: the cheapest whose loss of accuracy is within a tolerance, noise included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from dse.errors import ConfigError, StudyError
from dse.evaluation.statistics.power import documents_to_settle
from dse.pareto.front import front_table, objective_values
from dse.pareto.knee import knee_index
from dse.pareto.objective import OBJECTIVES, Objective, directions_of
from dse.report.columns import change, dense_row, interval, is_predicted, is_true, number, require_columns
from dse.report.units import percent, points

__all__ = ["Recommendation", "recommend"]

# A tolerance of 0.02 admits a drop of 0.61 - 0.59, which is 0.020000000000000018 in binary.
_SLACK = 1e-9


@dataclass(frozen=True)
class Recommendation:
    """A point to take, or why there is none; JSON-safe through `dataclasses.asdict`.

    Attributes:
        trial: The recommended trial: `bound_trial`, else `estimate_trial`; None where no trial fits.
        point_id: Its design point.
        reason: One sentence with figures.
        reduction: Its share of the parameters removed.
        cost_ratio: Geometric mean of its costs as ratios to dense; below 1 it saves.
        accuracy_drop: Accuracy of dense less its own, as a fraction; positive is a loss.
        accuracy_drop_low: Lower end of the drop's 95 % interval, None where unknown.
        accuracy_drop_high: Upper end of it.
        meets_bound: Whether the upper end, too, is within the tolerance; false where it is unknown.
        bound_trial: The cheapest trial whose upper end is within the tolerance, None where there is none.
        estimate_trial: The cheapest trial whose drop is within the tolerance by point estimate alone.
        nearest_miss_trial: Where nothing fits, the trial that misses by least.
        nearest_miss_reason: What it lacks, "" where there is none.
        near_miss_trial: The trial that more documents would settle: `estimate_trial` where its bound is outside the
            tolerance, or a nearest miss whose lower end is within it; None where there is none.
        documents_to_settle: Documents in all that would, if its drop stays as estimated; None where unknown.
        more_documents: How many of them are missing.
        knee_trial: The knee of the front, whatever the tolerance; None where only dense is on the front.
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
class _Candidate:
    """A complete, feasible trial that decomposes something, with all that the choice depends on."""

    trial: int
    point_id: str
    reduction: float
    drop: float
    ends: tuple[float, float] | None
    ratios: tuple[tuple[str, float], ...]
    documents: int | None = None

    @property
    def cost_ratio(self) -> float:
        """Geometric mean, so that halving one cost weighs as much as doubling another."""
        return math.exp(sum(math.log(ratio) for _, ratio in self.ratios) / len(self.ratios))

    @property
    def saves(self) -> bool:
        return any(ratio < 1 - _SLACK for _, ratio in self.ratios)

    def within(self, max_accuracy_drop: float, min_reduction: float | None) -> bool:
        enough = min_reduction is None or self.reduction >= min_reduction - _SLACK
        return enough and self.saves and self.drop <= max_accuracy_drop + _SLACK

    def meets_bound(self, max_accuracy_drop: float) -> bool:
        return self.ends is not None and self.ends[1] <= max_accuracy_drop + _SLACK

    def is_undecided(self, max_accuracy_drop: float) -> bool:
        """Whether the interval holds the tolerance: noise alone decides on which side the drop lies."""
        return self.ends is not None and self.ends[0] <= max_accuracy_drop < self.ends[1]

    def to_settle(self, max_accuracy_drop: float) -> int | None:
        """Documents in all at which the interval would leave the tolerance, if the drop stays as estimated."""
        if self.ends is None or self.documents is None:
            return None
        end = self.ends[1] if self.drop <= max_accuracy_drop else self.ends[0]
        return documents_to_settle(self.drop, end, max_accuracy_drop, self.documents)

    def shortfall(self, max_accuracy_drop: float, min_reduction: float | None) -> float:
        """How far outside the limits, both being fractions; a point that saves nothing comes after all others."""
        excess = max(0.0, self.drop - max_accuracy_drop) + max(0.0, (min_reduction or 0.0) - self.reduction)
        return excess if self.saves else excess + 10.0


def recommend(
    trials: pd.DataFrame,
    objectives: Sequence[Objective],
    *,
    max_accuracy_drop: float,
    min_reduction: float | None = None,
) -> Recommendation:
    """The cheapest trial whose drop in accuracy against the dense model is within tolerance, by its confidence bound.

    A trial fits when its drop is at most `max_accuracy_drop`, its reduction is at least `min_reduction`, and at least
    one of its costs is below dense: the dense model saves nothing and is never recommended. The cheapest trial whose
    upper 95 % bound fits is recommended; where no bound does, the cheapest that fits by its point estimate, said to be
    uncertified, with the number of documents that would settle it; where none does either, the nearest miss is named.
    Cheapest means the smallest geometric mean of the ratios to dense over the study's cost objectives
    (latency, energy, size; not accuracy or perplexity); a study without any is judged by its parameters. Ties go to the
    smaller drop, then to the earlier trial.

    Args:
        trials: The trials table.
        objectives: The study's objectives.
        max_accuracy_drop: As a fraction: 0.02 allows two percentage points.
        min_reduction: Least share of the parameters to be removed.

    Raises:
        ConfigError: A limit lies outside its interval, or the study did not measure accuracy.
        StudyError: The dense model has not been measured.
    """
    _check_limits(max_accuracy_drop, min_reduction)
    require_columns(trials, ("trial", "state", "feasible", "point_id", "reduction", "decomposed_tensors"))
    if "accuracy" not in trials.columns:
        raise ConfigError(
            "a recommendation needs accuracy, but this study did not measure it; add 'accuracy' to its objectives"
        )
    dense = dense_row(trials)
    if dense is None:
        raise StudyError("the dense model (trial 0) must be complete to compare with, but it is not; resume the study")
    candidates = _candidates(trials, dense, objectives)
    knee = _knee_trial(trials, objectives)
    limits = (max_accuracy_drop, min_reduction)
    fitting = sorted((c for c in candidates if c.within(*limits)), key=lambda c: (c.cost_ratio, c.drop, c.trial))
    if not fitting:
        return _nothing_fits(candidates, max_accuracy_drop, min_reduction, knee)
    estimate = fitting[0]
    bound = next((c for c in fitting if c.meets_bound(max_accuracy_drop)), None)
    best = estimate if bound is None else bound
    advice = Recommendation(
        trial=best.trial,
        point_id=best.point_id,
        reason=_reason(best, estimate, max_accuracy_drop, min_reduction),
        reduction=best.reduction,
        cost_ratio=best.cost_ratio,
        accuracy_drop=best.drop,
        accuracy_drop_low=None if best.ends is None else best.ends[0],
        accuracy_drop_high=None if best.ends is None else best.ends[1],
        meets_bound=bound is not None,
        bound_trial=None if bound is None else bound.trial,
        estimate_trial=estimate.trial,
        knee_trial=knee,
    )
    return _with_near_miss(advice, None if estimate.meets_bound(max_accuracy_drop) else estimate, max_accuracy_drop)


def _with_near_miss(advice: Recommendation, near_miss: _Candidate | None, max_accuracy_drop: float) -> Recommendation:
    """The advice with the trial that more documents would settle, and how many."""
    if near_miss is None or near_miss.ends is None:
        return advice
    needed = near_miss.to_settle(max_accuracy_drop)
    more = None if needed is None or near_miss.documents is None else needed - near_miss.documents
    return dataclasses.replace(advice, near_miss_trial=near_miss.trial, documents_to_settle=needed, more_documents=more)


def _check_limits(max_accuracy_drop: float, min_reduction: float | None) -> None:
    if not (math.isfinite(max_accuracy_drop) and max_accuracy_drop >= 0):
        raise ConfigError(
            f"the largest accuracy drop must be a number >= 0, but got {max_accuracy_drop};"
            " give a fraction, such as 0.02 for two percentage points"
        )
    if min_reduction is not None and not 0 <= min_reduction < 1:
        raise ConfigError(
            f"the smallest reduction must lie in [0, 1), but got {min_reduction}; give a fraction, such as 0.1"
        )


def _candidates(trials: pd.DataFrame, dense: pd.Series, objectives: Sequence[Objective]) -> list[_Candidate]:
    costs = [objective for objective in objectives if objective.is_cost]
    eligible = (trials["state"] == "complete").to_numpy(dtype=bool) & is_true(trials, "feasible")
    candidates = []
    for _, row in trials[eligible].iterrows():
        gain, reduction = change(row, dense, OBJECTIVES["accuracy"]), number(row, "reduction")
        if number(row, "decomposed_tensors") == 0 or gain is None or reduction is None:
            continue
        ratios = _cost_ratios(row, dense, costs) if costs else (("parameters", 1.0 - reduction),)
        if ratios is None:
            continue
        candidates.append(
            _Candidate(
                trial=int(row["trial"]),
                point_id=str(row["point_id"]),
                reduction=reduction,
                drop=-gain[0],
                ends=interval(row, "accuracy_drop"),
                ratios=ratios,
                documents=_documents(row),
            )
        )
    return candidates


def _documents(row: pd.Series) -> int | None:
    """Documents behind the drop, over all accuracy tasks."""
    documents = number(row, "accuracy_drop_documents")
    return None if documents is None else int(documents)


def _cost_ratios(row: pd.Series, dense: pd.Series, costs: Sequence[Objective]) -> tuple[tuple[str, float], ...] | None:
    """Each cost objective as a ratio to dense; None where one was not measured, for then the mean means nothing."""
    ratios = []
    for objective in costs:
        ratio = change(row, dense, objective)
        if ratio is None or ratio[0] <= 0:
            return None
        mark = "predicted " if is_predicted(row, objective.name) else ""
        ratios.append((mark + objective.label.lower(), ratio[0]))
    return tuple(ratios)


def _knee_trial(trials: pd.DataFrame, objectives: Sequence[Objective]) -> int | None:
    front = front_table(trials, objectives)
    if front.empty:
        return None
    # The dense model bounds the front as its extreme, but "change nothing" is no answer.
    index = knee_index(objective_values(front, objectives), directions_of(objectives), ~is_true(front, "is_dense"))
    return None if index is None else int(front["trial"].iloc[index])


def _reason(best: _Candidate, estimate: _Candidate, max_accuracy_drop: float, min_reduction: float | None) -> str:
    is_certified = best.meets_bound(max_accuracy_drop)
    how = "whose 95 % bound lies" if is_certified else "by point estimate"
    limits = _limits_words(max_accuracy_drop, min_reduction)
    text = (
        f"Trial {best.trial} is the cheapest {how} within {limits} ({_cost_words(best)});"
        f" it removes {percent(best.reduction)} of the parameters and {_drop_words(best)}"
    )
    if best.ends is None:
        return text + ", and no confidence interval is known."
    if not is_certified:
        settle = _settle_words(best, max_accuracy_drop)
        return f"{text}. It is not certified: no trial's bound is within the tolerance{settle}."
    if estimate is best:
        return text + ". It is the cheapest by point estimate, too."
    return (
        f"{text}. By point estimate trial {estimate.trial} is cheaper ({_cost_words(estimate)}): it"
        f" {_drop_words(estimate)}{_settle_words(estimate, max_accuracy_drop)}."
    )


def _cost_words(candidate: _Candidate) -> str:
    costs = " and ".join(f"{name} x{ratio:.2f}" for name, ratio in candidate.ratios)
    if len(candidate.ratios) == 1:
        return f"{costs} of dense"
    return f"x{candidate.cost_ratio:.2f} of dense in the geometric mean: {costs}"


def _settle_words(candidate: _Candidate, max_accuracy_drop: float) -> str:
    """How many more documents would tell on which side of the tolerance it lies; "" where that is not known."""
    needed = candidate.to_settle(max_accuracy_drop)
    if needed is None or candidate.documents is None:
        return ""
    more = needed - candidate.documents
    return f"; about {more:,} more documents ({needed:,} in all) would settle it, if its drop stays as estimated"


def _limits_words(max_accuracy_drop: float, min_reduction: float | None) -> str:
    words = f"an accuracy drop of {100 * max_accuracy_drop:g} pts"
    return words if not min_reduction else f"{words} and a reduction of at least {percent(min_reduction)}"


def _drop_words(candidate: _Candidate) -> str:
    verb = "loses" if candidate.drop >= 0 else "gains"
    words = f"{verb} {points(abs(candidate.drop), 2).lstrip('+')} of accuracy"
    if candidate.ends is None:
        return words
    low, high = (points(end, 2).removesuffix(" pts") for end in candidate.ends)
    return f"{words} (95 % interval of the drop {low} to {high} pts)"


def _nothing_fits(
    candidates: Sequence[_Candidate], max_accuracy_drop: float, min_reduction: float | None, knee: int | None
) -> Recommendation:
    limits = _limits_words(max_accuracy_drop, min_reduction)
    if not candidates:
        reason = f"No trial fits within {limits}: no decomposed trial is complete, feasible and measured in every cost."
        return Recommendation(None, None, reason, knee_trial=knee)
    nearest = min(candidates, key=lambda c: (c.shortfall(max_accuracy_drop, min_reduction), c.cost_ratio, c.trial))
    lacks = []
    if nearest.drop > max_accuracy_drop + _SLACK:
        lacks.append(f"{_drop_words(nearest)}, {points(nearest.drop - max_accuracy_drop, 2)} over the tolerance")
    if min_reduction is not None and nearest.reduction < min_reduction - _SLACK:
        lacks.append(f"removes only {percent(nearest.reduction)} of the parameters")
    if not nearest.saves:
        costs = " and ".join(f"{name} x{ratio:.2f}" for name, ratio in nearest.ratios)
        lacks.append(f"saves nothing ({costs} of dense)")
    why = " and ".join(lacks)
    is_undecided = len(lacks) == 1 and nearest.drop > max_accuracy_drop and nearest.is_undecided(max_accuracy_drop)
    near_miss = nearest if is_undecided else None
    settle = "" if near_miss is None else _settle_words(near_miss, max_accuracy_drop)
    advice = Recommendation(
        trial=None,
        point_id=None,
        reason=f"No trial fits within {limits}; the nearest miss, trial {nearest.trial}, {why}{settle}.",
        nearest_miss_trial=nearest.trial,
        nearest_miss_reason=f"it {why}",
        knee_trial=knee,
    )
    return _with_near_miss(advice, near_miss, max_accuracy_drop)
