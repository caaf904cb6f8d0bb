"""Whether a trial is worth evaluating further, from what is known of it at a rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc

from dse.errors import ConfigError, NonFiniteError
from dse.evaluation import EvaluationResult
from dse.pareto import Objective, directions_of, non_dominated, normalised_hypervolume, reference_point
from dse.search.multi_fidelity.established import Established, value_of
from dse.search.multi_fidelity.estimate import Estimate, estimate_objective
from dse.trial_record import Interval, TrialRecord

__all__ = ["PROXY_RUNG", "EarlyStopping", "Stop"]

PROXY_RUNG = 1
"""Where the KL divergence is all that was measured; shares of the documents follow."""

_SAMPLES = 64
_TWO_SIDED_95 = 1.959963984540054

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Stop:
    """Why a trial climbs no further.

    Attributes:
        rung: The one it reached.
        reason: For the record.
        estimates: Objective to its estimate at that rung, with a 95 % interval.
    """

    rung: int
    reason: str
    estimates: Mapping[str, Interval]


class EarlyStopping:
    """Stops a trial that is not expected to add enough to the hypervolume of the established front.

    What is believed of each objective (`belief.py`) is a normal distribution, or a value where it is known. The
    hypervolume that the trial would add is averaged over it, and set against that of the front of the trials that
    reached the top rung. So it counts both how likely a trial is to join the front and how much it would fill there: a
    trial in a gap climbs on a slim chance, one that would lead its neighbours by a hair does not climb on an even one.

    Source: Emmerich (2005), expected hypervolume improvement.
    """

    def __init__(
        self, objectives: Sequence[Objective], dense: Established, established: Sequence[Established], min_gain: float
    ) -> None:
        """Take the front.

        Args:
            objectives: Of the study.
            dense: Fixes the hypervolume's reference.
            established: Trials at the top rung, dense included.
            min_gain: Share of the front's hypervolume that a trial must be expected to add in order to climb.
        """
        self._objectives = tuple(objectives)
        self._known = list(established)
        self._least_gain = min_gain
        values = [[value_of(o, e.record) for o in objectives] for e in established if e.record.feasible]
        table = np.asarray(values, dtype=np.float64).reshape(-1, len(self._objectives))
        self._front = table[non_dominated(table, directions_of(self._objectives))]
        self._corner = _corner(self._objectives, dense.record)
        self._volume = None if self._corner is None else self._volume_with(self._front)

    def verdict(
        self,
        rung: int,
        record: TrialRecord,
        evaluation: EvaluationResult | None = None,
        masks: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> Stop | None:
        """Whether the trial ends here; what nothing is believed of stops nothing.

        Args:
            rung: The one just reached.
            record: What is known of the trial: cost, and what was measured so far.
            evaluation: On a share of the documents, where the rung is one.
            masks: Task to which of its documents belong to the share, in the order of the outcomes; shape (documents,).
        """
        if not self._volume:
            return None
        beliefs = {}
        for objective in self._objectives:
            found = estimate_objective(objective, record, evaluation, masks, self._known)
            if found is None:
                return None
            beliefs[objective] = found
        gain = self.expected_gain(list(beliefs.values()))
        if gain >= self._least_gain:
            return None
        estimates = {o.name: _interval(o, belief) for o, belief in beliefs.items()}
        return Stop(rung, _reason(gain, self._least_gain, estimates), estimates)

    def promise(self, record: TrialRecord) -> float:
        """Hypervolume that a stopped trial is expected to add by what is known now, as a share of the front's.

        What only the proxy said is predicted anew, since more trials tell by now what it means; what documents said is
        taken as it was estimated then.

        Args:
            record: A stopped trial's.
        """
        beliefs = []
        for objective in self._objectives:
            found = estimate_objective(objective, record, None, None, self._known)
            estimate = record.estimates.get(objective.name)
            if estimate is not None and (found is None or (record.rung or 0) > PROXY_RUNG):
                found = _belief(estimate)
            if found is None:
                return 0.0
            beliefs.append(found)
        return self.expected_gain(beliefs)

    def expected_gain(self, beliefs: Sequence[Estimate]) -> float:
        """Hypervolume that a trial is expected to add, as a share of the front's; one belief an objective."""
        if not self._volume:
            return float("inf")
        means = np.asarray([belief.mean for belief in beliefs])
        deviations = np.asarray([belief.deviation for belief in beliefs])
        uncertain = np.flatnonzero(deviations)
        samples = np.repeat(means[None, :], _SAMPLES if uncertain.size else 1, axis=0)
        if uncertain.size:
            samples[:, uncertain] += deviations[uncertain] * _normal_points(uncertain.size)
        added = [self._volume_with(np.vstack([self._front, sample])) - self._volume for sample in samples]
        return float(np.mean(added)) / self._volume

    def _volume_with(self, values: FloatArray) -> float:
        return normalised_hypervolume(values, self._corner or [], [o.ideal for o in self._objectives])


def _normal_points(dimensions: int) -> FloatArray:
    """Standard normal points that fill space evenly, the same in every call; shape (samples, dimensions)."""
    uniform = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(0)).random(_SAMPLES)
    points: FloatArray = norm.ppf(np.clip(uniform, 1e-9, 1 - 1e-9))
    return points


def _corner(objectives: Sequence[Objective], dense: TrialRecord) -> list[float] | None:
    """The hypervolume's reference; None where the dense model leaves no room for one."""
    values = {objective.name: value_of(objective, dense) for objective in objectives}
    try:
        reference = reference_point(objectives, values)
    except (ConfigError, NonFiniteError):
        return None
    return [reference[objective.name] for objective in objectives]


def _interval(objective: Objective, belief: Estimate) -> Interval:
    half = _TWO_SIDED_95 * belief.deviation
    ends = (belief.mean, belief.mean - half, belief.mean + half)
    return Interval(*(min(1.0, max(0.0, end)) for end in ends) if objective.is_fraction else ends)


def _belief(interval: Interval) -> Estimate:
    """What `_interval` was made of; the longer half, where the other was cut off at 0 or 1."""
    if interval.value is None or interval.low is None or interval.high is None:
        raise ValueError(f"an estimate has a value and both ends, but this one is {interval}")
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
