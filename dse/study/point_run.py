"""One evaluation under way: the record as far as it goes, so that a trial that fails keeps what it had."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dse.evaluation import EvaluationResult
from dse.trial_record import TrialRecord

__all__ = ["PointRun", "Reference"]


@dataclass(frozen=True)
class Reference:
    """What the dense model measured: every drop and ratio of the study refers to it."""

    evaluation: EvaluationResult | None
    record: TrialRecord


@dataclass
class PointRun:
    """The record of one evaluation, filled in step by step."""

    record: TrialRecord
    evaluation: EvaluationResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of a block to the record."""
        begin = time.perf_counter()
        try:
            yield
        finally:  # a phase may come in parts: a share of the documents, then the rest
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def finished(self, state: str, reason: str = "") -> TrialRecord:
        """The record with its outcome."""
        seconds = {**self.seconds, "total": sum(self.seconds.values())}
        return dataclasses.replace(self.record, state=state, reason=reason, seconds=seconds)
