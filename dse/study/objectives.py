"""What each objective needs to be measured, and how its value is read from a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dse.config import StudyConfig
from dse.errors import InvalidMeasurementError, MeterUnavailableError
from dse.pareto import Objective, objective_named
from dse.study.record import TrialRecord

__all__ = ["Needs", "needs_of", "objective_values", "resolve_objectives"]

_ACCURACY = {"accuracy", "perplexity"}
_LATENCY = {"prefill_latency_s", "decode_latency_s"}
_ENERGY = {"prefill_energy_j", "energy_per_token_j"}
_MEMORY = {"peak_memory_bytes"}


@dataclass(frozen=True)
class Needs:
    """Which measurements a study takes."""

    evaluation: bool
    latency: bool
    energy: bool
    memory: bool


def needs_of(objectives: Sequence[Objective], has_tasks: bool) -> Needs:
    """Measurements that these objectives need; tasks that are named are evaluated in any case."""
    names = {entry.name for entry in objectives}
    return Needs(
        evaluation=has_tasks or bool(names & _ACCURACY),
        latency=bool(names & _LATENCY),
        energy=bool(names & _ENERGY),
        memory=bool(names & _MEMORY),
    )


def resolve_objectives(config: StudyConfig, meter_problem: str | None) -> tuple[tuple[Objective, ...], list[str]]:
    """The study's objectives, optional ones that cannot be measured left out.

    Args:
        config: The study.
        meter_problem: Why energy cannot be measured here; None where it can.

    Returns:
        Objectives and the names that were dropped.

    Raises:
        ConfigError: An objective is unknown.
        MeterUnavailableError: Energy is asked for (and not optional) where no meter exists.
    """
    kept, dropped = [], []
    for entry in config.objectives:
        chosen = objective_named(entry.name)
        if entry.name in _ENERGY and meter_problem is not None:
            if not entry.optional:
                raise MeterUnavailableError(
                    f"objective '{entry.name}' needs an energy meter, but {meter_problem}; or mark the objective"
                    " `optional: true`, or leave it out"
                )
            dropped.append(entry.name)
            continue
        kept.append(chosen)
    return tuple(kept), dropped


def objective_values(objectives: Sequence[Objective], record: TrialRecord) -> list[float]:
    """Values in the study's order.

    Raises:
        InvalidMeasurementError: One was not measured in this trial.
    """
    values = []
    for entry in objectives:
        if entry.name in record.cost:
            values.append(float(record.cost[entry.name]))
            continue
        measured = record.quantities.get(entry.name)
        if measured is None or measured.value is None:
            raise InvalidMeasurementError(f"objective '{entry.name}' was not measured in trial {record.trial}")
        values.append(measured.value)
    return values
