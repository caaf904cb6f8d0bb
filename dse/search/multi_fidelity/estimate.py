"""What is believed of an objective before it is measured: a normal distribution, from a proxy and some documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.evaluation import EvaluationResult
from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.evaluation.statistics.intervals import paired_drop, paired_perplexity_ratio
from dse.pareto import Objective
from dse.search.multi_fidelity.established import Established, outcomes_of, restricted, value_of
from dse.search.multi_fidelity.prediction import linear_prediction
from dse.trial_record import TrialRecord

__all__ = ["Estimate", "estimate_objective"]

_QUALITIES = ("accuracy", "perplexity", *GRADED_METRICS)
"""Objectives that documents tell of, and that follow the proxy."""

_ONE_SIGMA = 0.6826894921370859
"""Confidence of an interval that reaches one standard deviation to either side."""


@dataclass(frozen=True)
class Estimate:
    """A normal distribution.

    Attributes:
        mean: In the objective's unit.
        deviation: Its standard deviation; 0 where the value is known.
    """

    mean: float
    deviation: float

    def and_also(self, other: Estimate | None) -> Estimate:
        """What both together say, taken as independent: means weighted by precision."""
        if other is None or self.deviation == 0:
            return self
        if other.deviation == 0:
            return other
        mine, theirs = self.deviation**-2, other.deviation**-2
        return Estimate((mine * self.mean + theirs * other.mean) / (mine + theirs), (mine + theirs) ** -0.5)


def estimate_objective(
    objective: Objective,
    record: TrialRecord,
    evaluation: EvaluationResult | None,
    masks: Mapping[str, NDArray[np.bool_]] | None,
    known: Sequence[Established],
) -> Estimate | None:
    """What is believed of a trial's objective; None where nothing is.

    Exact or measured values are known. A quality is predicted from the proxy by a line through the trials at the top
    rung, and from a share of the documents by its paired difference from the trial nearest by the proxy; both are
    combined. What is measured last (latency, energy, memory) is predicted from parameters and tensors touched.

    Args:
        objective: Which.
        record: What is known of the trial: cost, and what was measured so far.
        evaluation: On a share of the documents, where the rung is one.
        masks: Task to which of its documents belong to the share, in the order of the outcomes; shape (documents,).
        known: Trials at the top rung.
    """
    measured = record.quantities.get(objective.name)
    exact = record.cost.get(objective.name) if measured is None else measured.value
    if exact is not None:
        return Estimate(float(exact), 0.0)
    by_line = _by_line(objective, record, known)
    if evaluation is None or masks is None or objective.name not in _QUALITIES:
        return by_line
    by_documents = _by_documents(objective, evaluation, masks, _nearest(record, known))
    return by_documents if by_line is None else by_line.and_also(by_documents)


def _by_line(objective: Objective, record: TrialRecord, known: Sequence[Established]) -> Estimate | None:
    at = _features(objective, record)
    rows = [(_features(objective, entry.record), value_of(objective, entry.record)) for entry in known]
    usable = [(features, value) for features, value in rows if features is not None and math.isfinite(value)]
    if at is None or not usable:
        return None
    found = linear_prediction(
        np.asarray([features for features, _ in usable]),
        np.asarray([value for _, value in usable]),
        np.asarray(at),
        _ONE_SIGMA,
        slope_sign=int(objective.sign) if objective.name in _QUALITIES else 0,
    )
    return None if found is None else Estimate(found.value, found.high - found.value)


def _by_documents(
    objective: Objective, ours: EvaluationResult, masks: Mapping[str, NDArray[np.bool_]], other: Established
) -> Estimate | None:
    """The other's value on all documents, less its paired lead on these.

    The deviation shrinks by sqrt(1 - share): what counts is the value over all documents of the study, a finite
    population, part of which has been seen.
    """
    if other.evaluation is None:
        return None
    theirs = restricted(other.evaluation, masks)
    pairs = [
        (outcomes_of(objective, mine), outcomes_of(objective, yours), mine.weight)
        for mine, yours in zip(ours.tasks, theirs.tasks, strict=True)
    ]
    paired = [(mine, yours, weight) for mine, yours, weight in pairs if mine is not None and yours is not None]
    if not paired:
        return None
    before, after = [yours for _, yours, _ in paired], [mine for mine, _, _ in paired]
    weights, value = [weight for _, _, weight in paired], value_of(objective, other.record)
    unseen = math.sqrt(max(0.0, 1.0 - min(float(mask.mean()) for mask in masks.values())))
    if objective.name == "perplexity":
        ratio = paired_perplexity_ratio(before, after, weights, _ONE_SIGMA)
        if ratio.low is None or ratio.high is None or not 0 < ratio.low <= ratio.high < math.inf:
            return None
        return Estimate(value * ratio.value, value * ratio.value * math.log(ratio.high / ratio.low) / 2 * unseen)
    drop = paired_drop(before, after, weights, _ONE_SIGMA)
    if drop.low is None or drop.high is None or not math.isfinite(drop.high - drop.low):
        return None
    return Estimate(value - drop.value, (drop.high - drop.low) / 2 * unseen)


def _nearest(record: TrialRecord, known: Sequence[Established]) -> Established:
    """The trial most like this one by the proxy: what documents both find hard cancels best; else the first, dense."""
    at = record.quantities.get("kl_divergence")
    if at is None or at.value is None:
        return known[0]
    value = at.value

    def distance(entry: Established) -> float:
        proxy = entry.record.quantities.get("kl_divergence")
        return math.inf if proxy is None or proxy.value is None else abs(proxy.value - value)

    return min(known, key=distance)


def _features(objective: Objective, record: TrialRecord) -> list[float] | None:
    """What an objective is predicted from: the proxy for a quality, cost arithmetic for a cost."""
    if objective.is_cost:
        return [float(record.cost["parameters"]), float(len(record.point.get("tensors", {})))]
    proxy = record.quantities.get("kl_divergence")
    return None if proxy is None or proxy.value is None else [proxy.value]
