"""What is known of one trial: a frozen record, and the flat row it becomes in `trials.csv`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dse.cost import Cost

__all__ = ["EVALUATED_STATES", "Interval", "PairedChange", "TrialRecord", "TrialState", "finite", "to_row"]

TrialState = str
"""complete, failed (reason given), stopped (could not join the front any more; see `rung`), duplicate (values of an
earlier trial reused), infeasible, or interrupted."""

EVALUATED_STATES = ("complete", "failed", "stopped")
"""States that count against the budget."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; None where it is not known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PairedChange(Interval):
    """A drop or ratio against dense over the same documents, with its test.

    Attributes:
        documents: Compared.
        p_value: Two-sided: exact McNemar for right-or-wrong outcomes, paired bootstrap for graded ones.
        detectable: Smallest drop (or rise, as a ratio) that so many documents show with 80 % power.
    """

    documents: int | None = None
    p_value: float | None = None
    detectable: float | None = None


@dataclass(frozen=True)
class TrialRecord:
    """Everything about one trial that is kept; JSON-safe throughout.

    Attributes:
        trial: Number of the trial in the study's storage.
        state: See `TrialState`.
        origin: Who proposed it: dense, enqueued, ladder, spread, sampler, refined, repaired or retried.
        why: Why it was proposed, in words; "" where the origin says it all.
        point: The design point, expanded JSON.
        point_id: Its id.
        point_text: Its shortest JSON text, compact where the point is uniform.
        reason: Why it failed or is infeasible; "" otherwise.
        duplicate_of: The trial whose values were reused.
        feasible: Whether the point keeps the space's limits.
        rung: The rung of the fidelity ladder it reached (0 cost arithmetic, 1 proxy, then shares of the documents, the
            last one all of them); None without a ladder.
        cached_documents: Documents whose answers were known before this trial, so that `seconds` does not hold them.
        cost: Exact arithmetic of the point.
        quantities: Measured quantity to its value and interval, in SI units (accuracy, decode_latency_s, ...).
        estimates: Objective to its estimate at the rung where the trial was stopped, with the interval that stopped it.
        search_quantities: What the search's documents said of a quantity that fresh documents were asked about at the
            end; `quantities` then holds the latter.
        final_documents: Fresh documents at the end, over all tasks; 0 where there were none.
        predicted: Quantities that were not measured but predicted from the device profile.
        ratios: Quantity to its ratio to dense, with interval.
        accuracy_drop: Dense minus point, paired over the same documents; positive is worse.
        graded_drops: The same for each graded metric.
        tasks: Task to its metrics, standard errors and number of documents.
        divergence_windows: KL divergence to dense of each window of held-out text, nats per token; where measured.
        latency: The latency measurement in full: distributions, device, clock, validity.
        energy: The energy measurement in full.
        memory: The memory measurement in full.
        seconds: Phase to its duration.
        started_at: UTC, ISO 8601.
    """

    trial: int
    state: TrialState
    origin: str
    point: Mapping[str, Any]
    point_id: str
    point_text: str
    reason: str = ""
    why: str = ""
    duplicate_of: int | None = None
    feasible: bool = True
    rung: int | None = None
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
    seconds: Mapping[str, float] = field(default_factory=dict)
    started_at: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Read `to_json`'s mapping; keys of a later version are passed over."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        for key in ("quantities", "estimates", "search_quantities", "ratios", "graded_drops"):
            values[key] = {name: _interval(entry) for name, entry in values.get(key, {}).items()}
        values["divergence_windows"] = tuple(values.get("divergence_windows", ()))  # JSON has no tuples
        values["predicted"] = tuple(values.get("predicted", ()))
        if values.get("accuracy_drop") is not None:
            values["accuracy_drop"] = _interval(values["accuracy_drop"])
        return cls(**values)


def to_row(record: TrialRecord) -> dict[str, Any]:
    """One flat row of `trials.csv`; what is not known is absent."""
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
        "decomposed_tensors": len(record.point.get("tensors", {})),
    }
    cost_columns = (f.name for f in fields(Cost) if f.name in record.cost)
    row |= {name: record.cost[name] for name in cost_columns}
    for name, interval in record.quantities.items():
        row |= _interval_columns(name, interval)
    row |= {f"{name}_is_predicted": True for name in record.predicted}
    for name, interval in record.estimates.items():
        row |= _interval_columns(f"{name}_estimate", interval)
    for name, interval in record.search_quantities.items():
        row |= _interval_columns(f"{name}_search", interval)
    for name, interval in record.ratios.items():
        row |= _interval_columns(f"{name}_ratio", interval)
    if record.accuracy_drop is not None:
        row |= _interval_columns("accuracy_drop", record.accuracy_drop)
    for name, interval in record.graded_drops.items():
        row |= _interval_columns(f"{name}_drop", interval)
    for task, result in record.tasks.items():
        for metric, (value, stderr) in result["metrics"].items():
            row[f"task.{task}.{metric}"] = value
            row[f"task.{task}.{metric}_stderr"] = stderr
        row[f"task.{task}.documents"] = result["documents"]
    row |= {"cached_documents": record.cached_documents, "final_documents": record.final_documents}
    for phase, seconds in record.seconds.items():
        row[f"seconds_{phase}_s"] = seconds
    for name, entry in (("latency", record.latency), ("energy", record.energy), ("memory", record.memory)):
        if entry is not None and "is_valid" in entry:
            row[f"{name}_is_valid"], row[f"{name}_reason"] = entry["is_valid"], entry.get("reason", "")
    for cell in (record.latency or {}).get("cells", ()):
        row |= _cell_columns(cell)
    row["started_at"] = record.started_at
    return row


def _cell_columns(cell: Mapping[str, Any]) -> dict[str, float | None]:
    """Ratios of one further cell of the grid; none where it is invalid."""
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


def _interval_columns(name: str, interval: Interval) -> dict[str, float | None]:
    columns = {name: interval.value}
    if interval.low is not None and interval.high is not None:
        columns |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    if isinstance(interval, PairedChange):
        columns |= {
            f"{name}_p_value": interval.p_value,
            f"{name}_detectable": interval.detectable,
            f"{name}_documents": interval.documents,
        }
    return columns


def _interval(entry: Mapping[str, Any]) -> Interval:
    return PairedChange(**entry) if "p_value" in entry else Interval(**entry)


def finite(value: Any) -> Any:
    """A result as JSON values: keys as text, tuples as lists, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else str(value)
