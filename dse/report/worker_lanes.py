"""What each worker of a running study does, as the file `workers.json` of the study's folder tells it.

The file is for the live page only: nothing else depends on it, so it may be missing or out of date.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dse.files import write_json
from dse.trial_record import TrialRecord

__all__ = ["LANES_FILE", "SILENT_AFTER_S", "LaneState", "WorkerLane", "is_alive", "read_lanes", "write_lanes"]

_COSTS = ("reduction", "parameters", "weight_bytes")

LANES_FILE = "workers.json"
SILENT_AFTER_S = 120.0
"""A worker on another machine that wrote nothing for this long counts as silent."""

LaneState = Literal["working", "idle", "ended"]


@dataclass(frozen=True)
class WorkerLane:
    """One worker.

    Attributes:
        worker: Its name, unique in the study.
        state: `working` on a trial, `idle` between trials, or `ended`.
        device: Device, such as `cuda:0`; "" if the study's own.
        host: Machine that it runs on.
        pid: Its process.
        phase: Phase of the trial, such as `evaluate`; "" between trials.
        done: Steps of the phase that are done.
        total: Steps of the phase.
        trial: Number of the trial; None between trials.
        origin: Proposer of the trial.
        point_id: Its design point.
        cost: Exact costs of the point and its reduction.
        trial_started_s: Start of the trial, seconds since the epoch.
        started_s: Start of the worker.
        updated_s: Time of this entry.
        finished: Trials that it finished.
        failures: Trials of these that failed.
        failures_in_a_row: Failed trials since the last one that did not fail.
        last_failure: Reason of the last failure.
        temperature_celsius: Temperature of the device; None if unknown.
        power_w: Power of the device; None if unknown.
    """

    worker: str
    state: LaneState = "idle"
    device: str = ""
    host: str = ""
    pid: int | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    trial: int | None = None
    origin: str = ""
    point_id: str = ""
    cost: Mapping[str, float] = field(default_factory=dict)
    trial_started_s: float | None = None
    started_s: float = 0.0
    updated_s: float = 0.0
    finished: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    last_failure: str = ""
    temperature_celsius: float | None = None
    power_w: float | None = None

    def beginning(self, record: TrialRecord) -> WorkerLane:
        """The lane when a trial begins."""
        return replace(
            self,
            state="working",
            phase="",
            trial=record.trial,
            origin=record.origin,
            point_id=record.point_id,
            cost={name: record.cost[name] for name in _COSTS if name in record.cost},
            trial_started_s=time.time(),
        )

    def finishing(self, record: TrialRecord) -> WorkerLane:
        """The lane when a trial is finished."""
        lane = replace(self.waiting(), finished=self.finished + 1)
        return lane.failing(record.reason) if record.state == "failed" else replace(lane, failures_in_a_row=0)

    def failing(self, reason: str) -> WorkerLane:
        """The lane after a failure."""
        return replace(
            self.waiting(),
            failures=self.failures + 1,
            failures_in_a_row=self.failures_in_a_row + 1,
            last_failure=reason,
        )

    def waiting(self) -> WorkerLane:
        """The lane without a trial."""
        return replace(self, state="idle", phase="", trial=None, point_id="", cost={}, trial_started_s=None)


def write_lanes(path: Path, lanes: Sequence[WorkerLane]) -> None:
    """Write the file atomically.

    Raises:
        StorageFullError: The disk is full or the folder cannot be written.
    """
    write_json(path, {"workers": [asdict(lane) for lane in lanes]}, is_durable=False)


def read_lanes(path: Path) -> tuple[WorkerLane, ...]:
    """Read the file; () if it is missing or damaged, and without entries that cannot be read."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["workers"]
        return tuple(lane for lane in map(_lane, entries) if lane is not None)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def is_alive(lane: WorkerLane, now_s: float) -> bool:
    """Whether the worker still runs: its process on this machine, or a recent entry of another machine."""
    if lane.state == "ended":
        return False
    if lane.host == socket.gethostname() and lane.pid is not None:
        try:
            os.kill(lane.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # the process of another user
            return True
        return True
    return now_s - lane.updated_s < SILENT_AFTER_S


def _lane(entry: Any) -> WorkerLane | None:
    known = {f.name for f in fields(WorkerLane)}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("worker"), str):
        return None
    return WorkerLane(**{key: value for key, value in entry.items() if key in known})
