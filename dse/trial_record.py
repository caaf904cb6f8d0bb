"""The record of one trial, and the flat row that it becomes in `trials.csv`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dse.cost import Cost
from dse.defaults import RENAMED_OBJECTIVES
from dse.design_point import DesignPoint
from dse.errors import InvalidMeasurementError
from dse.evaluation.result import EvaluationResult
from dse.evaluation.statistics.intervals import Interval, PairedInterval
from dse.pareto.objective import Objective

__all__ = [
    "EVALUATED_STATES",
    "EvaluatedTrial",
    "TrialRecord",
    "TrialState",
    "json_safe",
    "objective_values",
    "trial_row",
]

TrialState = str
"""complete, failed (with a reason), stopped (early, see `rung`), duplicate (values of an earlier trial reused),
infeasible, or, in studies of version 0.1, interrupted."""

EVALUATED_STATES = ("complete", "failed", "stopped")
"""States that count against the budget."""

_INTERVALS = ("quantities", "estimates", "search_quantities", "ratios", "graded_drops")


@dataclass(frozen=True)
class TrialRecord:
    """Everything that is kept about one trial.

    Attributes:
        trial: Number of the trial in the study's storage.
        state: See `TrialState`.
        origin: The proposer: dense, enqueued, ladder, spread, sampler, allocation, uniform, removal, refined or
            repaired.
        point: The design point.
        point_text: The point's shortest JSON form, compact where the point is uniform.
        reason: Why the trial failed, was stopped or is infeasible; "" otherwise.
        why: Why the point was proposed; "" where the origin says it all.
        duplicate_of: The trial whose values were reused.
        feasible: Whether the point satisfies the limits of the search space.
        rung: The rung reached (0 cost arithmetic, 1 proxy, then growing shares of the documents); None without
            multi-fidelity evaluation.
        batch_tokens: Most tokens in an evaluation batch at the end of the trial; lower than in earlier trials if memory
            ran out. None without an evaluation.
        cached_documents: Documents whose answers came from the cache, so that `seconds` does not include them.
        cost: Exact cost of the point (parameters, bytes, FLOPs, reduction).
        quantities: Measured quantity to its interval, in SI units (accuracy, decode_latency_s, ...).
        estimates: Objective to its estimate at the rung where the trial was stopped.
        search_quantities: Values on the search's documents of quantities that were evaluated again on final documents;
            `quantities` then holds the final ones.
        final_documents: Number of final documents, over all tasks; 0 without a final evaluation.
        predicted: Quantities that were predicted from the device profile instead of measured.
        ratios: Quantity to its ratio to the baseline.
        accuracy_drop: Baseline minus candidate over the same documents; positive is worse.
        graded_drops: The same for each graded metric.
        tasks: Task to its metrics, standard errors and number of documents.
        divergence_windows: KL divergence from the baseline on each window of held-out text, in nats per token.
        latency: The latency measurement in full: distributions, device, clock, validity.
        energy: The energy measurement in full.
        memory: The memory measurement in full.
        serving: The measurement of an engine that serves requests in full.
        engines: Quantity to the engine that it was measured in; transformers in the study's process is not listed.
        engine_reasons: Engine to why its measurement after the search failed.
        seconds: Phase to its duration.
        started_at: UTC, ISO 8601.
    """

    trial: int
    state: TrialState
    origin: str
    point: DesignPoint
    point_text: str = ""
    reason: str = ""
    why: str = ""
    duplicate_of: int | None = None
    feasible: bool = True
    rung: int | None = None
    batch_tokens: int | None = None
    cached_documents: int = 0
    cost: Mapping[str, Any] = field(default_factory=dict)
    quantities: Mapping[str, Interval] = field(default_factory=dict)
    estimates: Mapping[str, Interval] = field(default_factory=dict)
    search_quantities: Mapping[str, Interval] = field(default_factory=dict)
    final_documents: int = 0
    predicted: Sequence[str] = ()
    ratios: Mapping[str, Interval] = field(default_factory=dict)
    accuracy_drop: Interval | None = None
    graded_drops: Mapping[str, Interval] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    divergence_windows: Sequence[float] = ()
    latency: Mapping[str, Any] | None = None
    energy: Mapping[str, Any] | None = None
    memory: Mapping[str, Any] | None = None
    serving: Mapping[str, Any] | None = None
    engines: Mapping[str, str] = field(default_factory=dict)
    engine_reasons: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    started_at: str = ""

    @property
    def point_id(self) -> str:
        """The id of the design point."""
        return self.point.id

    @property
    def is_dense(self) -> bool:
        """Whether the trial is the baseline, the dense model."""
        return self.point.is_dense

    def value(self, name: str) -> float | None:
        """The measured value of a quantity, or the exact one of a cost; None where the trial has neither."""
        measured = self.quantities.get(name)
        return self.cost.get(name) if measured is None else measured.value

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON mapping."""
        values: dict[str, Any] = json_safe({f.name: _plain(getattr(self, f.name)) for f in fields(self)})
        return values | {"point": self.point.to_json(), "point_id": self.point.id}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Read the mapping written by `to_json`; keys of a later version are ignored.

        Raises:
            KeyError: A key is missing.
            PointError: The point is damaged.
        """
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["point"] = DesignPoint.from_stored(data["point"])
        for key in _INTERVALS:
            found = {name: _interval(entry) for name, entry in values.get(key, {}).items()}
            values[key] = {RENAMED_OBJECTIVES.get(name, name): i for name, i in found.items() if i is not None}
        values["divergence_windows"] = tuple(values.get("divergence_windows", ()))  # JSON has no tuples
        values["predicted"] = tuple(values.get("predicted", ()))
        if values.get("accuracy_drop") is not None:
            values["accuracy_drop"] = _interval(values["accuracy_drop"])
        return cls(**values)


@dataclass(frozen=True)
class EvaluatedTrial:
    """A complete trial with its per-document outcomes.

    Attributes:
        record: The record, with every objective.
        evaluation: The evaluation on all documents; None if the study has no tasks.
    """

    record: TrialRecord
    evaluation: EvaluationResult | None


def objective_values(objectives: Sequence[Objective], record: TrialRecord) -> list[float]:
    """The values of a trial's objectives, in the study's order, all finite.

    Raises:
        InvalidMeasurementError: An objective was not measured in this trial.
    """
    values = []
    for objective in objectives:
        value = record.value(objective.name)
        if value is None or not math.isfinite(value):
            hint = "" if objective.is_cost else "; none of the tasks reports it"
            raise InvalidMeasurementError(
                f"objective '{objective.name}' must be measured in every trial, but trial {record.trial} has"
                f" {'none' if value is None else value}{hint}"
            )
        values.append(float(value))
    return values


def trial_row(record: TrialRecord) -> dict[str, Any]:
    """One flat row of `trials.csv`; unknown values are absent."""
    row: dict[str, Any] = {
        "trial": record.trial,
        "state": record.state,
        "reason": record.reason,
        "origin": record.origin,
        "why": record.why,
        "duplicate_of": record.duplicate_of,
        "feasible": record.feasible,
        "rung": record.rung,
        "point_id": record.point_id,
        "point": record.point_text,
        "decomposed_tensors": len(record.point),
    }
    row |= {f.name: record.cost[f.name] for f in fields(Cost) if f.name in record.cost}
    for suffix, intervals in (
        ("", record.quantities),
        ("_estimate", record.estimates),
        ("_search", record.search_quantities),
        ("_ratio", record.ratios),
        ("_drop", record.graded_drops),
        ("", {} if record.accuracy_drop is None else {"accuracy_drop": record.accuracy_drop}),
    ):
        for name, interval in intervals.items():
            row |= _interval_columns(f"{name}{suffix}", interval)
    row |= {f"{name}_is_predicted": True for name in record.predicted}
    row |= {f"{name}_engine": engine for name, engine in record.engines.items() if not name.startswith(f"{engine}.")}
    row |= {f"{engine}.reason": reason for engine, reason in record.engine_reasons.items()}
    for task, result in record.tasks.items():
        for metric, (value, stderr) in result["metrics"].items():
            row |= {f"task.{task}.{metric}": value, f"task.{task}.{metric}_stderr": stderr}
        row[f"task.{task}.documents"] = result["documents"]
    row |= {"batch_tokens": record.batch_tokens, "cached_documents": record.cached_documents}
    row |= {"final_documents": record.final_documents}
    row |= {f"seconds_{phase}_s": seconds for phase, seconds in record.seconds.items()}
    for name, entry in (("latency", record.latency), ("energy", record.energy), ("memory", record.memory)):
        if entry is not None and "is_valid" in entry:
            row |= {f"{name}_is_valid": entry["is_valid"], f"{name}_reason": entry.get("reason", "")}
    if record.serving is not None:
        row |= {"serving_is_valid": record.serving["is_valid"], "serving_reason": record.serving["reason"]}
    for cell in (record.latency or {}).get("cells", ()):
        row |= _cell_columns(cell)
    for cell in (record.serving or {}).get("cells", ()):
        row |= _serving_columns(cell)
    return row | {"started_at": record.started_at}


def _cell_columns(cell: Mapping[str, Any]) -> dict[str, float | None]:
    """Latency ratios of one further cell of the measurement grid; empty where the cell is invalid."""
    if not cell["is_valid"]:
        return {}
    spec = cell["spec"]
    name = f"cell.b{spec['batch_size']}_p{spec['prompt_tokens']}_n{spec['new_tokens']}"
    columns: dict[str, float | None] = {}
    for phase in ("prefill", "decode"):
        if cell.get(phase) is not None:
            ratio = Interval(*(cell[phase][key] for key in ("ratio", "ratio_low", "ratio_high")))
            columns |= _interval_columns(f"{name}.{phase}_ratio", ratio)
    return columns


def _serving_columns(cell: Mapping[str, Any]) -> dict[str, float | None]:
    """Ratios of one further cell that an engine served; empty where the cell is invalid."""
    if not cell["is_valid"]:
        return {}
    work = cell["work"]
    name = f"cell.b{work['concurrency']}_p{work['prompt_tokens']}_n{work['new_tokens']}"
    columns: dict[str, float | None] = {}
    for quantity in ("ttft", "tpot"):
        if cell.get(quantity) is not None:
            ratio = Interval(*(cell[quantity][key] for key in ("ratio", "ratio_low", "ratio_high")))
            columns |= _interval_columns(f"{name}.{quantity}_ratio", ratio)
    window = cell["window"]  # throughput is the inverse of the time of all requests
    inverse = Interval(*(1 / window[key] for key in ("ratio", "ratio_high", "ratio_low")))
    return columns | _interval_columns(f"{name}.throughput_ratio", inverse)


def _interval_columns(name: str, interval: Interval) -> dict[str, float | None]:
    columns: dict[str, float | None] = {name: interval.value}
    if interval.low is not None and interval.high is not None:
        columns |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    if isinstance(interval, PairedInterval):
        columns |= {
            f"{name}_p_value": interval.p_value,
            f"{name}_detectable": interval.smallest_detectable,
            f"{name}_documents": interval.documents,
        }
    return columns


def _interval(entry: Mapping[str, Any]) -> Interval | None:
    """Read an interval; None where its value is unknown."""
    if entry["value"] is None:
        return None
    values = {"smallest_detectable" if key == "detectable" else key: value for key, value in entry.items()}
    return PairedInterval(**values) if "p_value" in values else Interval(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return asdict(value)
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def json_safe(value: Any) -> Any:
    """A result made of JSON values: keys as text, tuples as lists, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else str(value)
