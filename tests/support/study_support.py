"""Shared by tests of studies: a listener that records and interrupts, small spaces, and views of a study."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dse.study import Study, StudyListener, StudyProgress
from dse.trial_record import EVALUATED_STATES, TrialRecord


@dataclass
class Watcher(StudyListener):
    """Records events; runs `before[n]` or `during[n]` in the trial that starts after n evaluated ones."""

    messages: list[str] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    ended: list[tuple[int, StudyProgress]] = field(default_factory=list)
    before: dict[int, Callable[[], None]] = field(default_factory=dict)
    during: dict[int, Callable[[], None]] = field(default_factory=dict)
    finished: int = -1

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if phase == "evaluate" and self.finished in self.during:
            self.during.pop(self.finished)()

    def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
        self.started.append(record.trial)
        self.finished = progress.finished
        if self.finished in self.before:
            self.before[self.finished]()

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        self.ended.append((record.trial, progress))


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_disk(filler: Path) -> None:
    """Write to this file until its disk is full."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(b"x" * 4096):
            pass


def evaluated(study: Study) -> list[TrialRecord]:
    return [record for record in study.records if record.state in EVALUATED_STATES]


def points_and_accuracies(study: Study) -> list[tuple[str, float | None]]:
    """Point ids and accuracies of the evaluated trials, in order."""
    return [(record.point_id, record.value("accuracy")) for record in evaluated(study)]


SMALL_SPACE: dict[str, Any] = {
    "name": "small",
    "methods": ["svd"],
    "layers": [0],
    "groups": {"roles": {"attention": ["query", "key"], "mlp": ["up"]}},
    "ranks": {"absolute": [2, 6]},
}
"""3 x 3 points, the dense one included."""
MILD_SPACE: dict[str, Any] = {
    "name": "mild",
    "methods": ["svd"],
    "roles": ["up"],
    "ranks": {"absolute": [2]},
    "limits": {"reduction": {"max": 0.1}},
}
MILD_POINT: dict[str, Any] = {"method": "svd", "rank": 2, "roles": ["up"]}
"""Expressible in `MILD_SPACE`, but beyond its limit."""
