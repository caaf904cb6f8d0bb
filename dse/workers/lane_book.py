"""What the workers of a study do, as `workers.json` in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dse.errors import StorageFullError
from dse.report.worker_lanes import WorkerLane, write_lanes
from dse.workers.jobs import EvaluateTrial, Job
from dse.workers.study_worker import WorkerFacts

__all__ = ["LaneBook"]

_PERIOD_S = 0.5


class _Ticketed(Protocol):
    @property
    def job(self) -> Job: ...


class _Worker(Protocol):
    @property
    def index(self) -> int: ...
    @property
    def facts(self) -> WorkerFacts | None: ...
    @property
    def ticket(self) -> _Ticketed | None: ...


class LaneBook:
    """The lanes of all workers, written at most once a second.

    The file is a convenience: a disk that is full must not end a trial, so its errors are ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lanes: dict[int, WorkerLane] = {}
        self._written_s = 0.0

    def welcome(self, worker: _Worker, phase: str = "") -> None:
        """A worker is ready, or prepares the study."""
        facts = worker.facts
        if facts is not None:
            self._change(worker, state="idle", phase=phase, device=facts.device, host=facts.host, pid=facts.pid)

    def begin(self, worker: _Worker) -> None:
        """A worker begins a job."""
        job = None if worker.ticket is None else worker.ticket.job
        if not isinstance(job, EvaluateTrial):
            return
        self._lanes[worker.index] = self._lane(worker).beginning(job.record)

    def finish(self, worker: _Worker, result: Any) -> None:
        """A worker has finished a job."""
        record, lane = getattr(result, "record", None), self._lane(worker)
        self._lanes[worker.index] = lane.waiting() if record is None else lane.finishing(record)

    def fail(self, worker: _Worker, reason: str) -> None:
        """A worker has ended in a job."""
        self._lanes[worker.index] = dataclasses.replace(self._lane(worker).failing(reason), phase="restart")

    def update(self, workers: Sequence[_Worker], phases: Mapping[int, tuple[str, int, int]]) -> None:
        """Note the phases of working workers, and write the file if that is due."""
        for worker in workers:
            if worker.ticket is not None and worker.index in phases:
                phase, done, total = phases[worker.index]
                self._change(worker, phase=phase, done=done, total=total)
        if time.monotonic() - self._written_s >= _PERIOD_S:
            self.write(workers)

    def end(self, workers: Sequence[_Worker]) -> None:
        """These workers have ended."""
        if self._written_s:
            for worker in workers:
                self._lanes[worker.index] = dataclasses.replace(self._lane(worker).waiting(), state="ended")
            self._save()

    def write(self, workers: Sequence[_Worker]) -> None:
        """Write the file now."""
        now_s = time.time()
        for worker in workers:
            if self._lane(worker).state != "ended":
                self._change(worker, updated_s=now_s)
        self._save()

    def _save(self) -> None:
        self._written_s = time.monotonic()
        lanes = [self._lanes[index] for index in sorted(self._lanes)]
        with contextlib.suppress(StorageFullError, OSError):
            write_lanes(self._path, lanes)

    def _lane(self, worker: _Worker) -> WorkerLane:
        fresh = WorkerLane(f"worker {worker.index + 1}", started_s=time.time())
        return self._lanes.setdefault(worker.index, fresh)

    def _change(self, worker: _Worker, **changes: Any) -> None:
        self._lanes[worker.index] = dataclasses.replace(self._lane(worker), **changes)
