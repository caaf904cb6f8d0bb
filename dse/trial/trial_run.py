"""The state of a trial while it runs: a failed trial keeps what it has measured so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dse.evaluation import EvaluationResult
from dse.evaluation.statistics.intervals import Interval
from dse.trial_record import EvaluatedTrial, TrialRecord, TrialState

__all__ = ["TrialRun"]


@dataclass
class TrialRun:
    """The record of a running trial, filled in step by step.

    Attributes:
        record: Frozen; every update replaces it.
        evaluation: The evaluation on all documents, once it is there.
        seconds: Phase to its duration.
    """

    record: TrialRecord
    evaluation: EvaluationResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def update(self, **changes: Any) -> None:
        """Replace fields of the record."""
        self.record = dataclasses.replace(self.record, **changes)

    def set_quantity(self, name: str, value: Interval, ratio: Interval | None = None) -> None:
        """Add a measured quantity, and its ratio to the baseline if known."""
        ratios = {**self.record.ratios, **({} if ratio is None else {name: ratio})}
        self.update(quantities={**self.record.quantities, name: value}, ratios=ratios)

    def set_quantity_beside(self, name: str, value: Interval, baseline: EvaluatedTrial | None) -> None:
        """Add a measured quantity, and its ratio to the baseline's value."""
        dense = None if baseline is None else baseline.record.value(name)
        self.set_quantity(name, value, Interval(value.value / dense) if dense else None)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of a block to a phase; a phase may consist of several blocks."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def finished(self, state: TrialState, reason: str = "") -> TrialRecord:
        """The record with its final state."""
        seconds = {**self.seconds, "total": sum(self.seconds.values())}
        return dataclasses.replace(self.record, state=state, reason=reason, seconds=seconds)
