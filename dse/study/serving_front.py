"""Measure the front and its ties in a serving engine after the search, paired with the dense model.

The search keeps its own values: a front compares like with like, so no axis mixes engines. What the engine measures has
names of its own, such as `vllm.tpot_s`, and a front of its own, `vllm.on_front`, among the trials that it measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from dse.config import StudyConfig
from dse.decomposition import decompose
from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint
from dse.errors import EngineUnavailableError, TrialError
from dse.evaluation.statistics.intervals import Interval
from dse.measurement import IdlePower, device_lock
from dse.pareto import Objective
from dse.report.trials_table import is_eligible, mark_front
from dse.trial.engine_measurements import EngineMeasurer, engine_key, first_cell, serving_entry, serving_quantities
from dse.trial_record import TrialRecord
from dse.workers.listener import StudyListener
from dse.workers.setup import PreparedStudy

__all__ = [
    "MeasureServing",
    "engine_attribute",
    "engines_of",
    "mark_engine_fronts",
    "mark_front_of",
    "measure_front",
    "measured_entry",
    "serving_pending",
    "waiting_trials",
    "with_engine_values",
]

_PREFIX = "serving."


def engine_attribute(engine: str) -> str:
    """Attribute of a study that holds what an engine measured after the search, by trial number."""
    return _PREFIX + engine


def engines_of(attributes: Mapping[str, Any]) -> list[str]:
    """The engines that measured trials after the search."""
    return [name.removeprefix(_PREFIX) for name in attributes if name.startswith(_PREFIX)]


@dataclasses.dataclass(frozen=True)
class MeasureServing:
    """Measure the point of a record in the study's serving engine.

    Attributes:
        record: The record of a complete trial.
        dense: The dense model's values in this engine; None for the dense model itself.
        idle: Idle power, for net energy.
    """

    record: TrialRecord
    dense: Mapping[str, float] | None
    idle: IdlePower | None = None

    def run(self, prepared: PreparedStudy, listener: StudyListener) -> dict[str, Any]:
        """Measure; a failure is part of the result, not raised.

        Returns:
            `quantities` and `ratios` by name, the `serving` entry, and the `reason` of a failure ("" without one).

        Raises:
            EngineUnavailableError: The engine is not installed any more.
        """
        if prepared.pair is None:
            raise ValueError("a study without a serving engine cannot measure in one")
        measurer = EngineMeasurer(prepared.loaded, prepared.plan, prepared.pair, listener.on_phase)
        return measured_entry(measurer, self.record.point, prepared.evaluator.bank, self.dense, self.idle)


def measured_entry(
    measurer: EngineMeasurer,
    point: DesignPoint,
    source: FactorSource,
    dense: Mapping[str, float] | None,
    idle: IdlePower | None = None,
) -> dict[str, Any]:
    """Measure a point in an engine.

    Args:
        measurer: Measures on a resident model, which is dense before and after.
        point: The point.
        source: Source of its factors.
        dense: The dense model's values in this engine; None for the dense model itself.
        idle: Idle power, for net energy.

    Returns:
        `quantities` and `ratios` by name, the `serving` entry, and the `reason` of a failure ("" without one).
    """
    loaded, meter = measurer.loaded, measurer.plan.meter
    try:
        with device_lock(loaded.device), decompose(loaded, point, source) as applied:
            cells = measurer.cells(applied, is_dense=dense is None, meter=meter, idle=idle)
        first = first_cell(cells)
        found = serving_quantities(first, dense, latencies=True) if first.is_valid else {}
    except TrialError as error:
        return {"quantities": {}, "ratios": {}, "serving": None, "reason": str(error)}
    return {
        "quantities": {name: dataclasses.asdict(value) for name, (value, _) in found.items()},
        "ratios": {name: dataclasses.asdict(ratio) for name, (_, ratio) in found.items()},
        "serving": serving_entry(cells),
        "reason": first.reason,
    }


def measure_front(
    measure: Callable[[TrialRecord, Mapping[str, float] | None], Mapping[str, Any]],
    baseline: TrialRecord,
    waiting: Callable[[Mapping[str, Any]], Sequence[TrialRecord]],
    found: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure the dense model and every waiting trial in the engine.

    Args:
        measure: Measures a record, given the dense model's values; None for the dense model.
        baseline: The dense model's record.
        waiting: Returns the trials that are still to be measured, given the results so far.
        found: Results of an earlier run, by trial number.
        keep: Stores the results after every trial; a kill loses at most the trial in progress.

    Raises:
        EngineUnavailableError: The engine cannot measure the dense model.
    """
    known = {trial: entry for trial, entry in found.items() if not entry["reason"] or int(trial) != baseline.trial}
    key = str(baseline.trial)
    if key not in known:
        known[key] = dict(measure(baseline, None))
        if known[key]["reason"]:
            reason = known[key]["reason"]
            raise EngineUnavailableError(f"the dense model must be measurable in the engine, but {reason}")
        keep(known)
    dense = {name: float(value["value"]) for name, value in known[key]["quantities"].items()}
    for record in waiting(known):
        known[str(record.trial)] = dict(measure(record, dense))
        keep(known)


def waiting_trials(table: pd.DataFrame, records: Sequence[TrialRecord], found: Mapping[str, Any]) -> list[TrialRecord]:
    """Trials on the front, and those tied with it, that the engine has not measured.

    Args:
        table: The trials table with `on_front` and `tied_with`.
        records: The records of the trials.
        found: Results so far, by trial number.
    """
    chosen = table["on_front"].to_numpy(dtype=bool) | table["tied_with"].notna().to_numpy(dtype=bool)
    numbers = {int(trial) for trial in table.loc[chosen, "trial"]}
    wanted = [record for record in records if record.trial in numbers and record.state == "complete"]
    return [record for record in wanted if str(record.trial) not in found]


def serving_pending(
    config: StudyConfig, table: pd.DataFrame, records: Sequence[TrialRecord], attributes: Mapping[str, Any]
) -> bool:
    """Whether the study measures its front in an engine and a trial is still to be measured."""
    if config.measurement.when != "front":
        return False
    found = attributes.get(engine_attribute(config.measurement.engine), {})
    return bool(waiting_trials(table, records, found))


def with_engine_values(record: TrialRecord, attributes: Mapping[str, Any]) -> TrialRecord:
    """The record with the quantities that engines measured after the search, such as `vllm.tpot_s`."""
    for engine in engines_of(attributes):
        entry = attributes[engine_attribute(engine)].get(str(record.trial))
        if entry is None:
            continue
        values = {engine_key(engine, name): Interval(**value) for name, value in entry["quantities"].items()}
        ratios = {engine_key(engine, name): Interval(**value) for name, value in entry["ratios"].items()}
        record = dataclasses.replace(
            record,
            quantities={**record.quantities, **values},
            ratios={**record.ratios, **ratios},
            engines={**record.engines, **dict.fromkeys(values, engine)},
            engine_reasons={**record.engine_reasons, **({engine: entry["reason"]} if entry["reason"] else {})},
        )
    return record


def mark_engine_fronts(
    table: pd.DataFrame, objectives: Sequence[Objective], attributes: Mapping[str, Any]
) -> pd.DataFrame:
    """The table with `<engine>.on_front` for each engine that measured trials after the search.

    Objectives that the engine measures have its values; the others, accuracy for example, do not depend on an engine.
    Only trials that the engine measured take part.
    """
    for engine in engines_of(attributes):
        table = mark_front_of(table, objectives, engine)
    return table


def mark_front_of(table: pd.DataFrame, objectives: Sequence[Objective], prefix: str) -> pd.DataFrame:
    """The table with `<prefix>.on_front`: the front among the trials that have values under this prefix.

    Objectives without such a column keep the values of the search.
    """
    columns = {entry.name: f"{prefix}.{entry.name}" for entry in objectives}
    present = {name: column for name, column in columns.items() if column in table.columns}
    if not present:
        return table
    seen = is_eligible(table) & table[list(present.values())].notna().all(axis=1).to_numpy()
    replaced = table.loc[seen].assign(**{name: table.loc[seen, column] for name, column in present.items()})
    front = pd.Series(data=False, index=table.index)
    if seen.any():
        front.loc[replaced.index] = mark_front(replaced, objectives)["on_front"].to_numpy(dtype=bool)
    return table.assign(**{f"{prefix}.on_front": front})
