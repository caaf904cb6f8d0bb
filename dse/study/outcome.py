"""What a finished trial is worth to the study: its objectives' values, and the limits that its measurements break."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dse.config import LimitsConfig
from dse.errors import InvalidMeasurementError
from dse.pareto import Objective
from dse.search.spaces.limits import measured_violations
from dse.study.objectives import objective_values
from dse.trial_record import TrialRecord

__all__ = ["broken_limits", "valued"]


def broken_limits(limits: LimitsConfig, record: TrialRecord) -> dict[str, float]:
    """By how much the measured quantities of a trial break the limits on them; <= 0 keeps them."""
    known = {name: entry.value for name, entry in record.quantities.items() if entry.value is not None}
    return measured_violations(limits, known)


def valued(objectives: Sequence[Objective], record: TrialRecord) -> tuple[TrialRecord, list[float] | None]:
    """The record and its values in the study's order; one that lacks a value has failed, and none has values then."""
    if record.state != "complete":
        return record, None
    try:
        return record, objective_values(objectives, record)
    except InvalidMeasurementError as error:
        return dataclasses.replace(record, state="failed", reason=str(error)), None
