"""Writes what the worker of this process does to `workers.json`, for `dse watch`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from dse.errors import StorageFullError
from dse.report.worker_lanes import WorkerLane, write_lanes
from dse.trial_record import TrialRecord
from dse.workers.listener import StudyListener, StudyProgress

__all__ = ["LaneListener"]

_PERIOD_S = 1.0  # between two writes within a phase: a reader needs no more, and a tiny trial takes milliseconds


class LaneListener(StudyListener):
    """Passes every event on to another listener, and keeps the file up to date.

    The file is a convenience: a disk that is full must not end a trial, so its errors are ignored.

    Args:
        listener: Receives every event.
        path: The file.
    """

    def __init__(self, listener: StudyListener, path: Path) -> None:
        self._listener, self._path = listener, path
        self._lane = WorkerLane("worker 1", host=socket.gethostname(), pid=os.getpid(), started_s=time.time())
        self._written_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._written_s:  # a study that never started has no folder to write to
            self._write(dataclasses.replace(self._lane.waiting(), state="ended"))

    def on_message(self, message: str) -> None:
        """Pass on."""
        self._listener.on_message(message)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """Pass on, and write at most once a second within a trial."""
        self._listener.on_phase(phase, done, total)
        if self._lane.trial is not None and time.monotonic() - self._written_s >= _PERIOD_S:
            self._write(dataclasses.replace(self._lane, phase=phase, done=done, total=total))

    def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
        """Pass on, and write the new trial."""
        self._listener.on_trial_start(progress, record)
        self._write(self._lane.beginning(record))

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        """Count the trial, and pass on; the next trial's start writes the file."""
        self._lane = self._lane.finishing(record)
        self._listener.on_trial_end(progress, record)

    def _write(self, lane: WorkerLane) -> None:
        self._lane = dataclasses.replace(lane, updated_s=time.time())
        self._written_s = time.monotonic()
        with contextlib.suppress(StorageFullError, OSError):
            write_lanes(self._path, [self._lane])
