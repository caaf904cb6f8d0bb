"""Hypervolume gained by each origin of points, and a bandit over proposers that learns from these gains."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dse.errors import InvalidMeasurementError
from dse.pareto import Objective, directions_of, ideal_point, non_dominated, normalised_hypervolume
from dse.trial_record import EVALUATED_STATES, TrialRecord, objective_values

__all__ = ["Ledger", "OriginShare", "choose_proposer", "credited_origins", "origin_shares", "selection_probabilities"]

_DECAY = 0.93  # a gain counts half after ten evaluations, because gains shrink as the front grows
_LONGEST_MEMORY = 1000  # older gains count less than rounding errors
_PRIOR_EVALUATIONS = 2.0  # each proposer starts with this many evaluations of average gain
_MIN_PROBABILITY = 0.15


@dataclass(frozen=True)
class OriginShare:
    """The contribution of one origin.

    Attributes:
        origin: Its name.
        evaluations: Number of evaluated trials, including failed and stopped ones.
        front_points: How many of them are on the current front.
        hypervolume_gained: Sum of the normalised hypervolume that each trial added when it finished.
    """

    origin: str
    evaluations: int
    front_points: int
    hypervolume_gained: float

    def describe(self) -> str:
        """`refined: 6 evaluations, 3 on the front, +0.0123 hypervolume`."""
        noun = "evaluation" if self.evaluations == 1 else "evaluations"
        return (
            f"{self.origin}: {self.evaluations} {noun}, {self.front_points} on the front,"
            f" {self.hypervolume_gained:+.4f} hypervolume"
        )


@dataclass
class Ledger:
    """The hypervolume gained by each evaluation; the same trials in the same order yield the same gains.

    Attributes:
        objectives: The study's objectives.
        reference: Objective to its value at the reference point; None before the baseline is measured. Until then all
            gains are 0.
        gains: For each evaluated trial in order: the origin that is credited, and the hypervolume gained.
    """

    objectives: Sequence[Objective]
    reference: Mapping[str, float] | None = None
    gains: list[tuple[str, float]] = field(default_factory=list)
    _values: list[list[float]] = field(default_factory=list)
    _volume: float = 0.0
    _interrupted: dict[str, str] = field(default_factory=dict)

    def add(self, record: TrialRecord) -> str:
        """Add a finished trial.

        Returns:
            The credited origin: the trial's own, or the original one if the trial retries an interrupted one.
        """
        origin = record.origin
        if origin == "retried":
            origin = self._interrupted.get(record.point_id, origin)
        if record.state == "interrupted":
            self._interrupted.setdefault(record.point_id, origin)
        if record.state in EVALUATED_STATES:
            self.gains.append((origin, self._gain(record)))
        return origin

    def _gain(self, record: TrialRecord) -> float:
        if self.reference is None or record.state != "complete" or not record.feasible:
            return 0.0
        try:
            self._values.append(objective_values(self.objectives, record))
        except InvalidMeasurementError:
            return 0.0
        corner = [self.reference[objective.name] for objective in self.objectives]
        ideal = ideal_point(self.objectives, corner)
        values = np.array(self._values)
        before, self._volume = self._volume, normalised_hypervolume(values, corner, ideal)
        # Dominated points never count again; keeping them would make every later trial slower.
        kept = non_dominated(values, directions_of(self.objectives))
        self._values = [entry for entry, is_kept in zip(self._values, kept, strict=True) if is_kept]
        return max(0.0, self._volume - before)


def credited_origins(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> dict[int, str]:
    """Trial number to the origin that is credited with the trial."""
    ledger = Ledger(objectives)
    return {record.trial: ledger.add(record) for record in records}


def origin_shares(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    reference: Mapping[str, float] | None,
    front: Collection[int],
) -> tuple[OriginShare, ...]:
    """The contribution of each origin in order of appearance, without the baseline.

    Args:
        records: All trials in order.
        reference: Reference point of the hypervolume; None before the baseline is measured.
        front: Numbers of the trials on the front.
    """
    ledger = Ledger(objectives, reference)
    counts: dict[str, list[int]] = {}
    for record in records:
        origin = ledger.add(record)
        if record.state in EVALUATED_STATES and origin != "dense":
            entry = counts.setdefault(origin, [0, 0])
            entry[0] += 1
            entry[1] += record.trial in front
    gained = {origin: sum(gain for whose, gain in ledger.gains if whose == origin) for origin in counts}
    return tuple(OriginShare(origin, entry[0], entry[1], gained[origin]) for origin, entry in counts.items())


def selection_probabilities(gains: Sequence[tuple[str, float]], proposers: Sequence[str]) -> dict[str, float]:
    """Probability of each proposer to be selected next: proportional to its mean gain per evaluation.

    Gains are discounted exponentially, because early evaluations gain more under every proposer. A minimum probability
    keeps every proposer in use, since some pay off late in a study only.

    Args:
        gains: Origin and hypervolume gained of each evaluation so far, in order.

    Returns:
        Proposer to probability, summing to 1; uniform if nothing was gained.
    """
    weighted = {proposer: [0.0, 0.0] for proposer in proposers}
    for age, (origin, gain) in enumerate(reversed(gains[-_LONGEST_MEMORY:])):
        if origin in weighted:
            weighted[origin][0] += _DECAY**age * gain
            weighted[origin][1] += _DECAY**age
    total_gain = sum(gain for gain, _ in weighted.values())
    total_weight = sum(weight for _, weight in weighted.values())
    average = total_gain / total_weight if total_weight else 0.0
    rates = {
        proposer: (gain + _PRIOR_EVALUATIONS * average) / (weight + _PRIOR_EVALUATIONS)
        for proposer, (gain, weight) in weighted.items()
    }
    total = sum(rates.values())
    floor = min(_MIN_PROBABILITY, 1.0 / len(proposers))
    free = 1.0 - floor * len(proposers)
    return {
        proposer: floor + free * (rate / total if total > 0 else 1 / len(proposers)) for proposer, rate in rates.items()
    }


def choose_proposer(gains: Sequence[tuple[str, float]], proposers: Sequence[str], generator: random.Random) -> str:
    """Select a proposer at random by `selection_probabilities`; deterministic for given gains and generator state."""
    found = selection_probabilities(gains, proposers)
    return generator.choices(list(found), weights=list(found.values()))[0]
