"""Whether a trial can still join the front, from what is known of it at a rung."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dse.evaluation import EvaluationResult, TaskResult
from dse.evaluation.graded import GRADED_METRICS
from dse.evaluation.statistics import paired_drop, paired_perplexity_ratio
from dse.pareto import Objective, directions_of, non_dominated
from dse.study.fidelity.prediction import linear_prediction
from dse.study.record import Interval, TrialRecord

__all__ = ["Established", "Judge", "Stop"]

_PAIRED = ("accuracy", "perplexity", *GRADED_METRICS)
"""Objectives that a share of the documents bounds: paired with a rival on the same documents."""


@dataclass(frozen=True)
class Established:
    """A trial that reached the top rung.

    Attributes:
        record: Complete, with every objective.
        evaluation: On all documents; None where the study has no tasks.
    """

    record: TrialRecord
    evaluation: EvaluationResult | None


@dataclass(frozen=True)
class Stop:
    """Why a trial climbs no further.

    Attributes:
        rung: The one it reached.
        reason: For the record.
        estimates: Objective to its estimate at that rung, with the interval it was judged by.
    """

    rung: int
    reason: str
    estimates: Mapping[str, Interval]


class Judge:
    """Stops a trial when one established front point is surely no worse in every objective.

    Surely means: exactly known (parameters), or by the optimistic end of an interval. An accuracy is bounded at the
    proxy by a line fitted through the trials at the top rung (accuracy against KL divergence, prediction interval), and
    on a share of the documents by its paired difference from the rival on those very documents. Since what counts is
    the rival's lead over all documents of the study, a finite population, the interval shrinks by sqrt(1 - share).
    Latency, energy and memory, which are measured last, are bounded by a line through parameters and tensors touched.
    What cannot be bounded stops nothing.
    """

    def __init__(
        self, objectives: Sequence[Objective], dense: Established, established: Sequence[Established], confidence: float
    ) -> None:
        """Take the rivals.

        Args:
            objectives: Of the study.
            dense: The reference of every estimate.
            established: Trials at the top rung, dense included.
            confidence: Two-sided, of every interval; a bound is one end of it.
        """
        self._objectives = tuple(objectives)
        self._dense = dense
        self._known = [entry for entry in established if entry.record.feasible]
        self._all = list(established)
        self._confidence = confidence
        values = [[_value(o, entry.record) for o in objectives] for entry in self._known]
        table = np.asarray(values, dtype=np.float64).reshape(len(self._known), len(self._objectives))
        mask = non_dominated(table, directions_of(self._objectives))
        self.rivals = [entry for entry, is_on_front in zip(self._known, mask, strict=True) if is_on_front]

    def verdict(
        self,
        rung: int,
        record: TrialRecord,
        evaluation: EvaluationResult | None = None,
        masks: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> Stop | None:
        """Whether the trial ends here.

        Args:
            rung: The one just reached.
            record: What is known of the trial: cost, and what was measured so far.
            evaluation: On a share of the documents, where the rung is one.
            masks: Task to which of its documents belong to the share, in the order of the outcomes; shape (documents,).
        """
        for rival in self.rivals:
            if all(self._is_surely_no_better(o, record, evaluation, masks, rival) for o in self._objectives):
                estimates = {o.name: self._estimate(o, record, evaluation, masks) for o in self._objectives}
                known = {name: entry for name, entry in estimates.items() if entry is not None}
                if len(known) == len(estimates):
                    return Stop(rung, self._reason(rival, known), known)
        return None

    def _is_surely_no_better(
        self,
        objective: Objective,
        record: TrialRecord,
        evaluation: EvaluationResult | None,
        masks: Mapping[str, NDArray[np.bool_]] | None,
        rival: Established,
    ) -> bool:
        if evaluation is not None and masks is not None and objective.name in _PAIRED and rival.evaluation is not None:
            lead = self._lead(objective, evaluation, restricted(rival.evaluation, masks), _share(masks))
            if lead is not None and lead.low > 0:
                return True
        bound = self._without_documents(objective, record)
        if bound is None:
            return False
        theirs = _value(objective, rival.record)
        best = bound.low if objective.direction == "minimize" else bound.high
        return best is not None and objective.sign * (best - theirs) >= 0

    def _lead(
        self, objective: Objective, ours: EvaluationResult, theirs: EvaluationResult, share: float
    ) -> _Lead | None:
        """How far the other result is ahead on the same documents: a difference, of perplexities one of logarithms."""
        pairs = [
            (_outcomes(objective, mine), _outcomes(objective, yours), mine.weight)
            for mine, yours in zip(ours.tasks, theirs.tasks, strict=True)
        ]
        known = [(mine, yours, weight) for mine, yours, weight in pairs if mine is not None and yours is not None]
        if not known:
            return None
        before, after = [yours for _, yours, _ in known], [mine for mine, _, _ in known]
        weights = [weight for _, _, weight in known]
        if objective.name == "perplexity":
            ratio = paired_perplexity_ratio(before, after, weights, self._confidence)
            estimate, low, high = math.log(ratio.estimate), _log(ratio.low), _log(ratio.high)
        else:
            drop = paired_drop(before, after, weights, self._confidence)
            estimate, low, high = drop.estimate, drop.low, drop.high
        if low is None or high is None or not all(map(math.isfinite, (estimate, low, high))):
            return None
        unseen = math.sqrt(max(0.0, 1.0 - share))
        return _Lead(estimate, estimate - (estimate - low) * unseen, estimate + (high - estimate) * unseen)

    def _without_documents(self, objective: Objective, record: TrialRecord) -> Interval | None:
        """An objective that is exact, was measured, or can be predicted."""
        exact = record.quantities.get(objective.name)
        value = record.cost.get(objective.name) if exact is None else exact.value
        if value is not None:
            return Interval(float(value), float(value), float(value))
        at = _features(objective, record)
        rows = [(_features(objective, e.record), _value(objective, e.record)) for e in self._all]
        known = [(f, v) for f, v in rows if f is not None and math.isfinite(v)]
        if at is None or not known:
            return None
        found = linear_prediction(
            np.asarray([f for f, _ in known]),
            np.asarray([v for _, v in known]),
            np.asarray(at),
            self._confidence,
            slope_sign=int(objective.sign) if objective.name in _PAIRED else 0,
        )
        return None if found is None else Interval(found.value, found.low, found.high)

    def _estimate(
        self,
        objective: Objective,
        record: TrialRecord,
        evaluation: EvaluationResult | None,
        masks: Mapping[str, NDArray[np.bool_]] | None,
    ) -> Interval | None:
        """Its value over all documents as far as this rung tells: dense over all, less the paired difference here."""
        if evaluation is not None and masks is not None and objective.name in _PAIRED and self._dense.evaluation:
            lead = self._lead(objective, evaluation, restricted(self._dense.evaluation, masks), _share(masks))
            dense = _value(objective, self._dense.record)
            if lead is not None and objective.name == "perplexity":
                return Interval(*(dense * math.exp(d) for d in (lead.estimate, lead.low, lead.high)))
            if lead is not None:
                ends = (dense - lead.estimate, dense - lead.high, dense - lead.low)
                return Interval(*(min(1.0, max(0.0, end)) for end in ends) if objective.is_fraction else ends)
        return self._without_documents(objective, record)

    def _reason(self, rival: Established, estimates: Mapping[str, Interval]) -> str:
        shown = []
        for objective in self._objectives:
            entry = estimates[objective.name]
            told = f"{entry.value:.4g}"
            if entry.low != entry.high:
                told = f"about {told} ({entry.low:.4g} to {entry.high:.4g})"
            shown.append(f"{objective.name} {told} against {_value(objective, rival.record):.4g}")
        return f"cannot join the front: trial {rival.record.trial} leads ({', '.join(shown)})"


@dataclass(frozen=True)
class _Lead:
    estimate: float
    low: float
    high: float


def restricted(result: EvaluationResult, masks: Mapping[str, NDArray[np.bool_]]) -> EvaluationResult:
    """Only some documents of a result, for paired comparisons; its own values and standard errors are left out."""
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
    """Of each document, where the task says something of the objective."""
    if objective.name in GRADED_METRICS:
        return task.graded.get(objective.name)
    return task.outcomes if task.kind == objective.name else None


def _share(masks: Mapping[str, NDArray[np.bool_]]) -> float:
    """The smallest share of any task: what bounds the shrinking of a mean over tasks from the safe side."""
    return min(float(mask.mean()) for mask in masks.values())


def _value(objective: Objective, record: TrialRecord) -> float:
    measured = record.quantities.get(objective.name)
    value = record.cost.get(objective.name) if measured is None else measured.value
    return math.nan if value is None else float(value)


def _features(objective: Objective, record: TrialRecord) -> list[float] | None:
    """What an objective is predicted from: the proxy for a quality, cost arithmetic for a cost."""
    if objective.is_cost:
        return [float(record.cost["parameters"]), float(len(record.point.get("tensors", {})))]
    proxy = record.quantities.get("kl_divergence")
    return None if proxy is None or proxy.value is None else [proxy.value]


def _log(value: float | None) -> float | None:
    return None if value is None or value <= 0 else math.log(value)
