"""What each objective needs to be measured, and how its value is read from a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dse.config import StudyConfig
from dse.errors import ConfigError, MeterUnavailableError
from dse.evaluation.result import PERPLEXITY_METRICS
from dse.pareto import Objective, objective_named

__all__ = [
    "RequiredMeasurements",
    "check_tasks_serve",
    "objective_values",
    "required_measurements",
    "resolve_objectives",
]

_DIVERGENCE = {"kl_divergence"}
_ACCURACY = {"accuracy", "perplexity"}
_GRADED: Mapping[str, str] = {
    "choice_probability": "a multiple-choice task",
    "target_log_likelihood": "a multiple-choice or cloze task",
}
"""Graded metric to the tasks that have it."""
_LATENCY = {"prefill_latency_s", "decode_latency_s"}
_ENERGY = {"prefill_energy_j", "energy_per_token_j"}
_MEMORY = {"peak_memory_bytes"}


@dataclass(frozen=True)
class RequiredMeasurements:
    """Which measurements a study takes.

    Attributes:
        evaluation: Accuracy.
        divergence: KL divergence to dense.
        latency: Prefill and decode.
        energy: Of both.
        memory: Peaks.
        valid_energy: Whether a trial fails where its energy is invalid, because an objective is read from it.
    """

    evaluation: bool
    divergence: bool
    latency: bool
    energy: bool
    memory: bool
    valid_energy: bool = True


def required_measurements(
    objectives: Sequence[Objective], has_tasks: bool, *, has_grid: bool = False, has_meter: bool = False
) -> RequiredMeasurements:
    """Measurements that these objectives need.

    What the study names beside them is taken in any case: tasks, a grid of more than one cell, a meter.
    """
    names = {entry.name for entry in objectives}
    return RequiredMeasurements(
        evaluation=has_tasks or bool(names & (_ACCURACY | _GRADED.keys())),
        divergence=bool(names & _DIVERGENCE),
        latency=has_grid or bool(names & _LATENCY),
        energy=has_meter or bool(names & _ENERGY),
        memory=bool(names & _MEMORY),
        valid_energy=bool(names & _ENERGY),
    )


def resolve_objectives(
    config: StudyConfig, meter_problem: str | None, begun_with: Sequence[str] | None = None
) -> tuple[tuple[Objective, ...], dict[str, str]]:
    """The study's objectives, optional ones that cannot be measured left out.

    Args:
        config: The study.
        meter_problem: Why energy cannot be measured here; None where it can.
        begun_with: Objectives of the trials that are there already; a study keeps them.

    Returns:
        Objectives, and the names that were dropped with the reason.

    Raises:
        ConfigError: An objective is unknown, or none is left.
        MeterUnavailableError: Energy is asked for (and not optional) where no meter exists.
    """
    kept: list[Objective] = []
    dropped: dict[str, str] = {}
    for entry in config.objectives:
        chosen = objective_named(entry.name)
        if begun_with is not None and entry.name not in begun_with:
            dropped[entry.name] = "this study was begun without it"
        elif entry.name in _ENERGY and meter_problem is not None:
            if begun_with is not None:
                raise MeterUnavailableError(
                    f"this study was begun with objective '{entry.name}' and needs its energy meter, but"
                    f" {meter_problem}; or choose another `--out`"
                )
            if not entry.optional:
                raise MeterUnavailableError(
                    f"objective '{entry.name}' needs an energy meter, but {meter_problem}; or mark the objective"
                    " `optional: true`, or leave it out"
                )
            dropped[entry.name] = meter_problem
        else:
            kept.append(chosen)
    if not kept:
        raise ConfigError("a study needs an objective that can be measured here, but all of them were left out")
    return tuple(kept), dropped


def check_tasks_serve(
    objectives: Sequence[Objective], metrics: Mapping[str, str], graded: Mapping[str, Sequence[str]]
) -> None:
    """Refuse an accuracy, perplexity or graded metric that none of the tasks measures, as far as names tell.

    Args:
        objectives: Of the study.
        metrics: Task to the metric that stands for it.
        graded: Task to the graded metrics that it has.

    Raises:
        ConfigError: No task serves the objective.
    """
    listed = ", ".join(f"{task} by {metric}" for task, metric in metrics.items())
    kinds = {metric.partition(",")[0] in PERPLEXITY_METRICS for metric in metrics.values()}
    for entry in objectives:
        if entry.name in _ACCURACY and (entry.name == "perplexity") not in kinds:
            raise ConfigError(
                f"objective '{entry.name}' needs a task whose metric is of that kind, but the tasks are measured"
                f" otherwise ({listed}); name another task, or give it a `metric`"
            )
        if entry.name in _GRADED and not any(entry.name in names for names in graded.values()):
            raise ConfigError(
                f"objective '{entry.name}' needs {_GRADED[entry.name]} that says which answer is right, but none of the"
                f" tasks is one ({', '.join(graded)}); name another task"
            )
