"""How a sampler hears of a trial that was stopped: a table of ways; docs/fidelity.md says which measured best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dse.pareto import Objective
from dse.trial_record import TrialRecord

__all__ = ["TELL", "Told", "told"]

_CONSTRAINT = "fidelity"


@dataclass(frozen=True)
class Told:
    """What the sampler is told.

    Attributes:
        values: In the study's order; None where it is told none.
        violations: Constraint to its value, <= 0 feasible.
    """

    values: list[float] | None
    violations: Mapping[str, float]


def _estimate(objectives: Sequence[Objective], record: TrialRecord) -> Told:
    """The values estimated at the rung reached, as though they had been measured."""
    return Told([_known(record.estimates[o.name].value) for o in objectives], {})


def _bound(objectives: Sequence[Objective], record: TrialRecord) -> Told:
    """The pessimistic end of each estimate."""
    ends = []
    for objective in objectives:
        entry = record.estimates[objective.name]
        ends.append(_known(entry.high if objective.direction == "minimize" else entry.low))
    return Told(ends, {})


def _infeasible(objectives: Sequence[Objective], record: TrialRecord) -> Told:
    """As a point outside a limit: learnt from as bad, with no values."""
    return Told(None, {_CONSTRAINT: 1.0})


def _nothing(objectives: Sequence[Objective], record: TrialRecord) -> Told:
    """As a trial that failed: not learnt from."""
    return Told(None, {})


TELL: Mapping[str, Callable[[Sequence[Objective], TrialRecord], Told]] = {
    "estimate": _estimate,
    "bound": _bound,
    "infeasible": _infeasible,
    "nothing": _nothing,
}
"""Name in study files to what the sampler is told of a stopped trial."""


def told(way: str, objectives: Sequence[Objective], record: TrialRecord, violations: Mapping[str, float]) -> Told:
    """What the sampler is told of a stopped trial, the space's own constraints included."""
    found = TELL[way](objectives, record)
    return Told(found.values, {**violations, **found.violations})


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("an estimate has a value and both ends")
    return value
