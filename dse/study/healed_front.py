"""The front after healing: training its points for minutes at the end of a study, and their values beside the others.

The search keeps its own values. What is measured after healing has names of its own, such as `healed.accuracy`, and a
front of its own, `healed.on_front`, among the trials that were healed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dse.config import StudyConfig
from dse.evaluation.statistics.intervals import Interval
from dse.healing import write_healed
from dse.trial_record import TrialRecord

__all__ = ["HEALED", "heal_trials", "healed_folder", "healing_pending", "trials_to_heal", "with_healed_values"]

HEALED = "healed"
"""Attribute of a study that holds the results of healing by trial number, and the prefix of their columns."""


def healed_folder(study: Path, trial: int) -> Path:
    """Where a study keeps the trained weights of a trial."""
    return study / HEALED / f"trial-{trial}"


def heal_trials(
    heal: Callable[[TrialRecord, Path], tuple[dict[str, Any], Mapping[str, Tensor]]],
    waiting: Sequence[TrialRecord],
    folder: Path,
    found: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Heal every waiting trial.

    Args:
        heal: Heals the point of a record, with its state in a folder; returns the entry and the trained weights.
        waiting: The trials to heal.
        folder: The folder of the study.
        found: Results so far, by trial number.
        keep: Stores the results after every trial; a kill loses at most the steps since the last state.
    """
    known = dict(found)
    for record in waiting:
        own = healed_folder(folder, record.trial)
        entry, weights = heal(record, own)
        if weights:
            write_healed(own, record.point, weights, entry)
        known[str(record.trial)] = entry
        keep(known)


def healing_pending(config: StudyConfig, front: Sequence[TrialRecord], attributes: Mapping[str, Any]) -> bool:
    """Whether the study heals its front and a trial on it is still to be healed."""
    return config.healing is not None and bool(trials_to_heal(front, attributes.get(HEALED, {})))


def trials_to_heal(front: Sequence[TrialRecord], found: Mapping[str, Any]) -> list[TrialRecord]:
    """Trials on the front, without the dense model, that have not been healed."""
    return [record for record in front if not record.is_dense and str(record.trial) not in found]


def with_healed_values(record: TrialRecord, found: Mapping[str, Any]) -> TrialRecord:
    """The record with quantities such as `healed.accuracy`, if its trial was healed."""
    entry = found.get(str(record.trial))
    if entry is None:
        return record
    values = {f"{HEALED}.{name}": _interval(value) for name, value in entry["quantities"].items()}
    if entry["accuracy_drop"] is not None:
        values[f"{HEALED}.accuracy_drop"] = _interval(entry["accuracy_drop"])
    before = {name: _interval(value) for name, value in entry["before"].items()}
    ratios = {f"{HEALED}.{name}": _interval(value) for name, value in entry["ratios"].items()}
    return dataclasses.replace(
        record, quantities={**record.quantities, **before, **values}, ratios={**record.ratios, **ratios}
    )


def _interval(value: Mapping[str, Any]) -> Interval:
    return Interval(float(value["value"]), value["low"], value["high"], value["documents"])
