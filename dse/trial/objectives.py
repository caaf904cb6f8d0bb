"""Which measurements the objectives of a study require, and the objective values and violations of a trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dse.config import LimitsConfig, StudyConfig
from dse.errors import ConfigError, InvalidMeasurementError, MeterUnavailableError
from dse.evaluation.result import PERPLEXITY_METRICS
from dse.models import LoadedModel
from dse.pareto import Objective, objective_named
from dse.search.spaces.limits import measured_violations
from dse.trial_record import TrialRecord, objective_values

__all__ = [
    "RequiredMeasurements",
    "check_engine",
    "check_phases",
    "check_tasks",
    "measured_limit_violations",
    "required_measurements",
    "resolve_objectives",
    "with_objective_values",
]

_DIVERGENCE = {"kl_divergence"}
_ACCURACY = {"accuracy", "perplexity"}
_GRADED: Mapping[str, str] = {
    "choice_probability": "a multiple-choice task",
    "target_log_likelihood": "a multiple-choice or cloze task",
}
"""Graded metric to the tasks that report it."""
_LATENCY = {"prefill_latency_s", "decode_latency_s"}
_ENERGY = {"prefill_energy_j", "energy_per_token_j"}
_SERVING = {"ttft_s", "tpot_s", "throughput_tokens_s"}
_SERVING_ENERGY = {"request_energy_j", "output_token_energy_j"}
_MEMORY = {"peak_memory_bytes"}
_DECODE = {"decode_latency_s", "energy_per_token_j", *_SERVING, *_SERVING_ENERGY}


@dataclass(frozen=True)
class RequiredMeasurements:
    """The measurements that a study takes in every trial.

    Attributes:
        evaluation: Accuracy on the tasks.
        divergence: KL divergence from the baseline.
        latency: Prefill and decode latency.
        energy: Prefill and decode energy.
        memory: Peak memory.
        valid_energy: Whether a trial with invalid energy fails, because energy is an objective.
        serving: TTFT, TPOT and throughput while an engine serves requests.
        serving_energy: Energy of the same windows.
        needs_serving: Whether an objective needs them; latencies alone can also be predicted.
    """

    evaluation: bool
    divergence: bool
    latency: bool
    energy: bool
    memory: bool
    valid_energy: bool = True
    serving: bool = False
    serving_energy: bool = False
    needs_serving: bool = False


def required_measurements(
    objectives: Sequence[Objective],
    has_tasks: bool,
    *,
    has_grid: bool = False,
    has_meter: bool = False,
    has_engine: bool = False,
) -> RequiredMeasurements:
    """The measurements that these objectives require, and those that the study file asks for explicitly.

    Args:
        objectives: The study's objectives.
        has_tasks: Whether the study has tasks.
        has_grid: Whether the measurement grid has more than one cell.
        has_meter: Whether the study names an energy meter.
        has_engine: Whether an engine outside this process measures every trial, and so provides all timings.
    """
    names = {objective.name for objective in objectives}
    timed = has_grid or bool(names & _LATENCY)
    serves_energy = bool(names & _SERVING_ENERGY)
    return RequiredMeasurements(
        evaluation=has_tasks or bool(names & (_ACCURACY | _GRADED.keys())),
        divergence=bool(names & _DIVERGENCE),
        latency=timed and not has_engine,
        energy=(has_meter and not has_engine) or bool(names & _ENERGY),
        memory=bool(names & _MEMORY),
        valid_energy=bool(names & _ENERGY),
        serving=serves_energy or bool(names & _SERVING) or (has_engine and (timed or has_meter)),
        serving_energy=serves_energy or (has_engine and has_meter),
        needs_serving=serves_energy or bool(names & _SERVING),
    )


def resolve_objectives(
    config: StudyConfig, meter_problem: str | None, started_with: Sequence[str] | None = None
) -> tuple[tuple[Objective, ...], dict[str, str]]:
    """The study's objectives, without optional ones that cannot be measured here.

    Args:
        config: The study.
        meter_problem: Why energy cannot be measured; None if it can.
        started_with: Objectives of the existing trials, which a resumed study keeps; None for a new study.

    Returns:
        The objectives, and the names of dropped ones with the reason.

    Raises:
        ConfigError: An objective is unknown, or none is left.
        MeterUnavailableError: Energy is an objective, not optional, and there is no meter.
    """
    kept: list[Objective] = []
    dropped: dict[str, str] = {}
    for entry in config.objectives:
        objective = objective_named(entry.name)
        if started_with is not None and entry.name not in started_with:
            dropped[entry.name] = "this study started without it"
        elif entry.name in _ENERGY | _SERVING_ENERGY and meter_problem is not None:
            if started_with is not None:
                raise MeterUnavailableError(
                    f"this study started with objective '{entry.name}' and needs its energy meter, but"
                    f" {meter_problem}; or choose another `--out`"
                )
            if not entry.optional:
                raise MeterUnavailableError(
                    f"objective '{entry.name}' needs an energy meter, but {meter_problem}; or mark the objective"
                    " `optional: true`, or leave it out"
                )
            dropped[entry.name] = meter_problem
        else:
            kept.append(objective)
    if not kept:
        raise ConfigError("a study needs an objective that can be measured here, but all of them were left out")
    return tuple(kept), dropped


def check_tasks(
    objectives: Sequence[Objective], metrics: Mapping[str, str], graded: Mapping[str, Sequence[str]]
) -> None:
    """Refuse an accuracy, perplexity or graded objective that no task can report, as far as metric names tell.

    Args:
        objectives: The study's objectives.
        metrics: Task to its main metric.
        graded: Task to its graded metrics.

    Raises:
        ConfigError: No task reports the objective.
    """
    listed = ", ".join(f"{task} by {metric}" for task, metric in metrics.items())
    kinds = {metric.partition(",")[0] in PERPLEXITY_METRICS for metric in metrics.values()}
    for objective in objectives:
        if objective.name in _ACCURACY and (objective.name == "perplexity") not in kinds:
            raise ConfigError(
                f"objective '{objective.name}' needs a task whose metric is of that kind, but the tasks report other"
                f" metrics ({listed}); name another task, or give it a `metric`"
            )
        if objective.name in _GRADED and not any(objective.name in names for names in graded.values()):
            raise ConfigError(
                f"objective '{objective.name}' needs {_GRADED[objective.name]} with a known right answer, but none of"
                f" the tasks is one ({', '.join(graded)}); name another task"
            )


def check_engine(config: StudyConfig) -> None:
    """Refuse objectives that a serving engine cannot measure.

    Raises:
        ConfigError: Energy of a single phase is an objective, which needs the model in this process.
    """
    settings = config.measurement
    phases = [entry.name for entry in config.objectives if entry.name in _ENERGY]
    if settings.is_external and settings.when == "every_trial" and phases:
        raise ConfigError(
            f"objective '{phases[0]}' is measured with the model in this process, but `measurement.engine` is"
            f" {settings.engine}; use request_energy_j or output_token_energy_j"
        )


def check_phases(objectives: Sequence[Objective], loaded: LoadedModel) -> None:
    """Refuse a decode objective for a model that does not generate.

    Raises:
        ConfigError: The model is not a decoder.
    """
    decode = [objective.name for objective in objectives if objective.name in _DECODE]
    if decode and not loaded.topology.is_decoder:
        raise ConfigError(
            f"objective '{decode[0]}' needs a model that generates, but {loaded.topology.architecture} does not;"
            " use prefill_latency_s or prefill_energy_j"
        )


def measured_limit_violations(limits: LimitsConfig, record: TrialRecord) -> dict[str, float]:
    """Limit to how far a measured quantity of the trial exceeds it; <= 0 is within the limit."""
    return measured_violations(limits, {name: interval.value for name, interval in record.quantities.items()})


def with_objective_values(
    objectives: Sequence[Objective], record: TrialRecord
) -> tuple[TrialRecord, list[float] | None]:
    """The record and its objective values in the study's order; a trial that lacks a value has failed."""
    if record.state != "complete":
        return record, None
    try:
        return record, objective_values(objectives, record)
    except InvalidMeasurementError as error:
        return dataclasses.replace(record, state="failed", reason=str(error)), None
