"""The estimate of an objective before it is fully measured: a normal distribution from a proxy and some documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.evaluation.result import EvaluationResult, TaskResult
from dse.evaluation.statistics.intervals import paired_drop, paired_perplexity_ratio
from dse.pareto import Objective
from dse.search.multi_fidelity.linear_prediction import linear_prediction
from dse.trial_record import EvaluatedTrial, TrialRecord

__all__ = ["DocumentMasks", "Estimate", "estimate_objective", "restricted"]

DocumentMasks = Mapping[str, NDArray[np.bool_]]
"""Task to a mask of shape (documents,): the documents of the share evaluated so far, in the order of the outcomes."""

_QUALITIES = ("accuracy", "perplexity", *GRADED_METRICS)
"""Objectives that are measured on documents and that correlate with the proxy."""

_ONE_SIGMA = 0.6826894921370859
"""Confidence of an interval of one standard deviation to either side."""


@dataclass(frozen=True)
class Estimate:
    """A normal distribution.

    Attributes:
        mean: In the objective's unit.
        deviation: Standard deviation; 0 if the value is known.
    """

    mean: float
    deviation: float

    def combined(self, other: Estimate | None) -> Estimate:
        """The product of two independent estimates: means weighted by precision."""
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
    masks: DocumentMasks | None,
    complete: Sequence[EvaluatedTrial],
) -> Estimate | None:
    """Estimate an objective of a trial that has not reached the top rung.

    Exact and measured values are known. A quality is predicted from the proxy by a line through the complete trials,
    and from a share of the documents by its paired difference from the complete trial with the nearest proxy value;
    both estimates are combined. Costs that are measured last (latency, energy, memory) are predicted from the number of
    parameters and of decomposed tensors.

    Args:
        record: The trial so far: its cost and what was measured.
        evaluation: Its evaluation on a share of the documents, if the rung is one.
        masks: The documents of that share.
        complete: Trials at the top rung, the baseline first.

    Returns:
        None if there is too little to go by.
    """
    exact = record.value(objective.name)
    if exact is not None:
        return Estimate(float(exact), 0.0)
    by_line = _from_line(objective, record, complete)
    if evaluation is None or masks is None or objective.name not in _QUALITIES:
        return by_line
    by_documents = _from_documents(objective, evaluation, masks, _nearest(record, complete))
    return by_documents if by_line is None else by_line.combined(by_documents)


def _from_line(objective: Objective, record: TrialRecord, complete: Sequence[EvaluatedTrial]) -> Estimate | None:
    at = _features(objective, record)
    rows = [(_features(objective, trial.record), trial.record.value(objective.name)) for trial in complete]
    usable = [(f, value) for f, value in rows if f is not None and value is not None and math.isfinite(value)]
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


def _features(objective: Objective, record: TrialRecord) -> list[float] | None:
    """What an objective is predicted from: the proxy for a quality, cost arithmetic for a cost."""
    if objective.is_cost:
        return [float(record.cost["parameters"]), float(len(record.point))]
    proxy = record.value("kl_divergence")
    return None if proxy is None else [proxy]


def _from_documents(
    objective: Objective, evaluation: EvaluationResult, masks: DocumentMasks, other: EvaluatedTrial
) -> Estimate | None:
    """The other trial's value on all documents, minus its paired lead on this share.

    The deviation shrinks by sqrt(1 - share): the target is the value over all documents of the study, a finite
    population of which a part has been seen.
    """
    whole = other.record.value(objective.name)
    if other.evaluation is None or whole is None:
        return None
    share = restricted(other.evaluation, masks)
    pairs = [
        (_outcomes(objective, mine), _outcomes(objective, theirs), mine.weight)
        for mine, theirs in zip(evaluation.tasks, share.tasks, strict=True)
    ]
    paired = [(mine, theirs, weight) for mine, theirs, weight in pairs if mine is not None and theirs is not None]
    if not paired:
        return None
    before, after = [theirs for _, theirs, _ in paired], [mine for mine, _, _ in paired]
    weights = [weight for _, _, weight in paired]
    unseen = math.sqrt(max(0.0, 1.0 - min(float(mask.mean()) for mask in masks.values())))
    if objective.name == "perplexity":
        ratio = paired_perplexity_ratio(before, after, weights, _ONE_SIGMA)
        if ratio.low is None or ratio.high is None or not 0 < ratio.low <= ratio.high < math.inf:
            return None
        return Estimate(whole * ratio.value, whole * ratio.value * math.log(ratio.high / ratio.low) / 2 * unseen)
    drop = paired_drop(before, after, weights, _ONE_SIGMA)
    if drop.low is None or drop.high is None or not math.isfinite(drop.high - drop.low):
        return None
    return Estimate(whole - drop.value, (drop.high - drop.low) / 2 * unseen)


def restricted(result: EvaluationResult, masks: DocumentMasks) -> EvaluationResult:
    """The result on some documents only, for paired comparison; its own values and standard errors are dropped."""
    tasks = tuple(
        dataclasses.replace(
            task,
            value=math.nan,
            stderr=None,
            documents=int(masks[task.task].sum()),
            outcomes=task.outcomes[masks[task.task]],
            graded={name: outcomes[masks[task.task]] for name, outcomes in task.graded.items()},
            all_metrics={},
        )
        for task in result.tasks
    )
    return EvaluationResult(tasks, result.seconds)


def _outcomes(objective: Objective, task: TaskResult) -> NDArray[np.float64] | None:
    """Per-document outcomes of an objective; None if the task does not measure it."""
    if objective.name in GRADED_METRICS:
        return task.graded.get(objective.name)
    return task.outcomes if task.kind == objective.name else None


def _nearest(record: TrialRecord, complete: Sequence[EvaluatedTrial]) -> EvaluatedTrial:
    """The complete trial with the nearest proxy value, whose outcomes correlate best; without a proxy the baseline."""
    at = record.value("kl_divergence")
    if at is None:
        return complete[0]

    def distance(trial: EvaluatedTrial) -> float:
        proxy = trial.record.value("kl_divergence")
        return math.inf if proxy is None else abs(proxy - at)

    return min(complete, key=distance)
