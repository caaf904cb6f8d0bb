"""Which origin earned what: evaluations, front points, and hypervolume gained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dse.errors import InvalidMeasurementError
from dse.pareto import Objective, normalised_hypervolume
from dse.study.objectives import objective_values
from dse.trial_record import EVALUATED_STATES, TrialRecord

__all__ = ["Ledger", "OriginShare", "credited_origins", "origin_shares", "share_words"]


@dataclass(frozen=True)
class OriginShare:
    """What one origin got and gave.

    Attributes:
        origin: Its name.
        evaluations: Trials evaluated (those that failed or were stopped included).
        front_points: Of them on the front now.
        hypervolume_gained: Sum of what each of them added to the normalised hypervolume when it came.
    """

    origin: str
    evaluations: int
    front_points: int
    hypervolume_gained: float


@dataclass
class Ledger:
    """Adds up, trial by trial, what each evaluation gained; the same trials in the same order give the same sums.

    Attributes:
        objectives: Of the study.
        reference: Objective to its reference value; None before the dense model is known, until when nothing counts.
        gains: Of each evaluated trial in order: the origin that is credited, and the hypervolume gained.
    """

    objectives: Sequence[Objective]
    reference: Mapping[str, float] | None = None
    gains: list[tuple[str, float]] = field(default_factory=list)
    _values: list[list[float]] = field(default_factory=list)
    _volume: float = 0.0
    _interrupted: dict[str, str] = field(default_factory=dict)

    def add(self, record: TrialRecord) -> str:
        """Count a finished trial; returns the origin that is credited with it.

        A trial that was interrupted and retried is its first proposer's.
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
        ideal = [objective.ideal for objective in self.objectives]
        before, self._volume = self._volume, normalised_hypervolume(np.array(self._values), corner, ideal)
        return max(0.0, self._volume - before)


def credited_origins(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> dict[int, str]:
    """Trial to the origin that is credited with it."""
    ledger = Ledger(objectives)
    return {record.trial: ledger.add(record) for record in records}


def origin_shares(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    reference: Mapping[str, float] | None,
    front: Collection[int],
) -> tuple[OriginShare, ...]:
    """What each origin earned, in order of appearance; the dense model, which nobody proposed, is left out.

    Args:
        records: All trials in order.
        objectives: Of the study.
        reference: Of the hypervolume; None while the dense model is not known.
        front: Trials on the front.
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


def share_words(share: OriginShare) -> str:
    """`refined 6, of them 3 on the front, +0.0123 hypervolume`."""
    return (
        f"{share.origin} {share.evaluations}, of them {share.front_points} on the front,"
        f" {share.hypervolume_gained:+.4f} hypervolume"
    )
