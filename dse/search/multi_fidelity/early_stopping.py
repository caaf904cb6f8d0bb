"""Early stopping by expected hypervolume improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc

from dse.errors import ConfigError, NonFiniteError
from dse.evaluation.result import EvaluationResult
from dse.evaluation.statistics.intervals import Interval
from dse.pareto import Objective, directions_of, ideal_point, non_dominated, normalised_hypervolume, reference_point
from dse.search.multi_fidelity.estimate import DocumentMasks, Estimate, estimate_objective
from dse.trial_record import EvaluatedTrial, TrialRecord

__all__ = ["PROXY_RUNG", "EarlyStopping", "Stop"]

PROXY_RUNG = 1
"""The rung at which only the KL divergence has been measured; shares of the documents follow."""

_SAMPLES = 64
_TWO_SIDED_95 = float(norm.ppf(0.975))

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Stop:
    """The decision to stop a trial.

    Attributes:
        rung: The rung it reached.
        reason: For the trial's record.
        estimates: Objective to its estimate at that rung, with a 95 % interval.
    """

    rung: int
    reason: str
    estimates: Mapping[str, Interval]


class EarlyStopping:
    """Stops trials that are not expected to add enough to the hypervolume of the complete trials' front.

    Each objective of a trial is either known or estimated as a normal distribution (`estimate.py`). The hypervolume
    that the trial would add to the front is averaged over that distribution and compared with the front's own. So both
    the probability of joining the front and the size of the gap it would fill count: a trial in a wide gap continues on
    a small chance, one that would lead its neighbours by a hair does not continue on an even one.

    Source: Emmerich (2005), expected hypervolume improvement.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        baseline: EvaluatedTrial,
        complete: Sequence[EvaluatedTrial],
        min_gain: float,
    ) -> None:
        """Compute the front.

        Args:
            baseline: The dense model, which fixes the reference point of the hypervolume.
            complete: Trials at the top rung, the baseline included.
            min_gain: Smallest expected gain, as a share of the front's hypervolume, at which a trial continues.
        """
        self._objectives = tuple(objectives)
        self._complete = list(complete)
        self._min_gain = min_gain
        values = [[_value(o, trial.record) for o in objectives] for trial in complete if trial.record.feasible]
        table = np.asarray(values, dtype=np.float64).reshape(-1, len(self._objectives))
        self._front = table[non_dominated(table, directions_of(self._objectives))]
        self._reference = _reference(self._objectives, baseline.record)
        self._volume = None if self._reference is None else self._volume_with(self._front)

    def decide(
        self,
        rung: int,
        record: TrialRecord,
        evaluation: EvaluationResult | None = None,
        masks: DocumentMasks | None = None,
    ) -> Stop | None:
        """Decide whether a trial stops here; a trial with an objective that cannot be estimated continues.

        Args:
            record: The trial so far: its cost and what was measured.
            evaluation: Its evaluation on a share of the documents, if the rung is one.
            masks: The documents of that share.
        """
        if not self._volume:
            return None
        found = {}
        for objective in self._objectives:
            estimate = estimate_objective(objective, record, evaluation, masks, self._complete)
            if estimate is None:
                return None
            found[objective] = estimate
        gain = self.expected_gain(list(found.values()))
        if gain >= self._min_gain:
            return None
        estimates = {o.name: _interval(o, estimate) for o, estimate in found.items()}
        return Stop(rung, _reason(gain, self._min_gain, estimates), estimates)

    def promise(self, record: TrialRecord) -> float:
        """Expected gain of a stopped trial by what is known now, as a share of the front's hypervolume.

        Estimates from the proxy alone are renewed, since more trials are complete by now; estimates from documents are
        kept as they were.
        """
        estimates = []
        for objective in self._objectives:
            found = estimate_objective(objective, record, None, None, self._complete)
            kept = record.estimates.get(objective.name)
            if kept is not None and (found is None or (record.rung or 0) > PROXY_RUNG):
                found = _estimate(kept)
            if found is None:
                return 0.0
            estimates.append(found)
        return self.expected_gain(estimates)

    def expected_gain(self, estimates: Sequence[Estimate]) -> float:
        """Hypervolume that a trial is expected to add, as a share of the front's; one estimate per objective."""
        if not self._volume:
            return math.inf
        means = np.asarray([estimate.mean for estimate in estimates])
        deviations = np.asarray([estimate.deviation for estimate in estimates])
        uncertain = np.flatnonzero(deviations)
        samples = np.repeat(means[None, :], _SAMPLES if uncertain.size else 1, axis=0)
        if uncertain.size:
            samples[:, uncertain] += deviations[uncertain] * _normal_points(uncertain.size)
        added = [self._volume_with(np.vstack([self._front, sample])) - self._volume for sample in samples]
        return float(np.mean(added)) / self._volume

    def _volume_with(self, values: FloatArray) -> float:
        corner = self._reference or []
        return normalised_hypervolume(values, corner, ideal_point(self._objectives, corner))


def _value(objective: Objective, record: TrialRecord) -> float:
    value = record.value(objective.name)
    return math.nan if value is None else float(value)


def _normal_points(dimensions: int) -> FloatArray:
    """Quasi-random standard normal points, the same in every call; shape (samples, dimensions)."""
    uniform = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(0)).random(_SAMPLES)
    points: FloatArray = norm.ppf(np.clip(uniform, 1e-9, 1 - 1e-9))
    return points


def _reference(objectives: Sequence[Objective], baseline: TrialRecord) -> list[float] | None:
    """Reference point of the hypervolume; None if the baseline's values do not define one."""
    values = {objective.name: _value(objective, baseline) for objective in objectives}
    try:
        reference = reference_point(objectives, values)
    except (ConfigError, NonFiniteError):
        return None
    return [reference[objective.name] for objective in objectives]


def _interval(objective: Objective, estimate: Estimate) -> Interval:
    half = _TWO_SIDED_95 * estimate.deviation
    ends = (estimate.mean, estimate.mean - half, estimate.mean + half)
    return Interval(*(min(1.0, max(0.0, end)) for end in ends) if objective.is_fraction else ends)


def _estimate(interval: Interval) -> Estimate:
    """The inverse of `_interval`, from the longer half if the other one was clipped at 0 or 1."""
    if interval.low is None or interval.high is None:
        raise ValueError(f"an estimate needs a value and both bounds, but got {interval}")
    half = max(interval.value - interval.low, interval.high - interval.value)
    return Estimate(interval.value, half / _TWO_SIDED_95)


def _reason(gain: float, min_gain: float, estimates: Mapping[str, Interval]) -> str:
    shown = [
        f"{name} {entry.value:.4g}"
        if entry.low == entry.high
        else f"{name} about {entry.value:.4g} ({entry.low:.4g} to {entry.high:.4g})"
        for name, entry in estimates.items()
    ]
    return (
        f"expected to add {100 * max(0.0, gain):.2g} % to the front's hypervolume, less than {100 * min_gain:.2g} %:"
        f" {', '.join(shown)}"
    )
