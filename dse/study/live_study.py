"""A study read again and again while it runs, for the live page: only what changed is read and computed anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dse.errors import InvalidMeasurementError
from dse.pareto import GrowingHypervolume, Objective, ideal_point, objectives_named
from dse.report.dashboard.snapshot import PendingTrial, StudySnapshot, VolumeStep
from dse.report.rank_map import ModelShape, reduction_of, shape_of
from dse.report.worker_lanes import LANES_FILE, WorkerLane, read_lanes
from dse.search.origins import credited_origins
from dse.search.proposal import Proposal
from dse.study.compare_trials import TrialComparison
from dse.study.folder import StudyFolder
from dse.study.storage import StudyStorage
from dse.study.study import Study
from dse.trial_record import EVALUATED_STATES, TrialRecord, objective_values

__all__ = ["LiveStudy"]

_WATCHED = ("study.yaml", "study.db", "study.db-wal", LANES_FILE)


class LiveStudy:
    """Makes snapshots of a study that may be running, and may not have finished a trial yet.

    The folder's files are looked at first: while none of them has changed, the last snapshot is returned. Records that
    were read stay in memory.

    Args:
        directory: The study's folder.

    Raises:
        StudyError: The folder holds no study, or a damaged one.
    """

    def __init__(self, directory: str | Path) -> None:
        self._given, self._folder = str(directory), StudyFolder(Path(directory))
        self._config = self._folder.read_config()
        self._lock = threading.Lock()
        self._storage: StudyStorage | None = None
        self._known: dict[int, TrialRecord] = {}
        self._study: Study | None = None
        self._changes = 0
        self._snapshot: StudySnapshot | None = None
        self._volume = _VolumeHistory()

    def snapshot(self) -> StudySnapshot:
        """See `StudySource.snapshot`.

        Raises:
            StudyError: The study was damaged or removed.
        """
        with self._lock:
            version = self._version()
            if self._snapshot is None or self._snapshot.version != version:
                self._snapshot = self._read(version)
            return self._snapshot

    def compare(self, first: int, second: int) -> TrialComparison:
        """See `Study.compare`."""
        with self._lock:
            study = self._study
        return (study or Study(self._folder.path)).compare(first, second)

    def _version(self) -> str:
        stamps = []
        for name in _WATCHED:
            try:
                status = (self._folder.path / name).stat()
                stamps.append(f"{status.st_mtime_ns}.{status.st_size}.{status.st_ino}")
            except OSError:
                stamps.append("-")
        return " ".join(stamps)

    def _read(self, version: str) -> StudySnapshot:
        storage = self._opened()
        attributes: dict[str, Any] = {} if storage is None else storage.attributes
        records = [] if storage is None else [self._same(record) for record in storage.records(self._known)]
        changed = self._study is None or len(records) != len(self._known) or any(
            self._known.get(record.trial) is not record for record in records
        )  # fmt: skip
        self._known = {record.trial: record for record in records}
        self._config = self._folder.read_config()
        names = attributes.get("objectives") or [entry.name for entry in self._config.objectives]
        started = {"objectives": names, **attributes}
        if changed or self._study is None or self._study.attributes != started:
            self._study = Study.running(self._folder, self._config, started, records)
            self._changes += 1
        study, facts = self._study, attributes.get("facts", {})
        proposals = [] if storage is None else storage.pending()
        lanes = read_lanes(self._folder.workers)
        points = [*(r.point for r in records), *(p.point for p, _ in proposals if p.point is not None)]
        shape = shape_of(facts, points)
        pending = tuple(_pending(proposal, start, lanes, shape, facts) for proposal, start in proposals)
        return StudySnapshot(
            version=version,
            trials_version=f"{self._changes} {[(entry.trial, entry.state, len(entry.known)) for entry in pending]}",
            name=self._config.name,
            directory=self._given,
            model=str(facts.get("model_ref") or self._config.model.ref),
            device=_device(facts) or self._config.model.device,
            objectives=study.objectives,
            trials=study.trials() if records else pd.DataFrame(),
            records={record.trial: record for record in study.records},
            pending=pending,
            lanes=lanes,
            steps=self._volume.steps(study.records, study.objectives, attributes.get("reference")),
            shape=shape,
            budget=self._config.budget.trials,
            evaluated=study.evaluated_trials,
            is_exhausted=study.is_exhausted,
            read_s=time.time(),
        )

    def _same(self, record: TrialRecord) -> TrialRecord:
        """The object that is known already if it is equal: a revised record is read every time."""
        known = self._known.get(record.trial)
        return known if known is not None and known == record else record

    def _opened(self) -> StudyStorage | None:
        """The storage, which a run that starts replaces if nothing was evaluated yet; None before it exists."""
        if self._storage is not None and not self._known:
            self._storage.close()
            self._storage = None
        if self._storage is None and self._folder.storage.exists() and StudyStorage.has_started(self._folder.storage):
            self._storage = StudyStorage.open_existing(self._folder.storage)
        return self._storage


class _VolumeHistory:
    """The hypervolume after each trial; a trial that was counted is not computed again."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._counted: list[tuple[TrialRecord, str]] = []
        self._steps: list[VolumeStep] = []
        self._volume: GrowingHypervolume | None = None

    def steps(
        self, records: list[TrialRecord], objectives: tuple[Objective, ...], reference: Mapping[str, float] | None
    ) -> tuple[VolumeStep, ...]:
        names = [objective.name for objective in objectives]
        if reference is None or not all(name in reference for name in names):
            return ()
        corner = [reference[name] for name in names]
        origins = credited_origins(records, objectives)
        evaluated = [(record, origins[record.trial]) for record in records if record.state in EVALUATED_STATES]
        same = all(a[0] is b[0] for a, b in zip(evaluated, self._counted, strict=False))
        if self._volume is None or self._key != (names, corner) or len(evaluated) < len(self._counted) or not same:
            self._key, self._counted, self._steps = (names, corner), [], []
            self._volume = GrowingHypervolume(corner, ideal_point(objectives, corner))
        for record, origin in evaluated[len(self._counted) :]:
            gained = 0.0
            if record.state == "complete" and record.feasible:
                try:
                    gained = self._volume.add(objective_values(objectives, record))
                except InvalidMeasurementError:
                    gained = 0.0
            self._steps.append(VolumeStep(record.trial, origin, gained, self._volume.value))
        self._counted = evaluated
        return tuple(self._steps)


def _pending(
    proposal: Proposal,
    start: float | None,
    lanes: tuple[WorkerLane, ...],
    shape: ModelShape,
    facts: Mapping[str, Any],
) -> PendingTrial:
    """A pending trial with what is known exactly about its point: from its worker, or from the point itself."""
    trial = -1 if proposal.trial is None else proposal.trial
    lane = next((lane for lane in lanes if lane.trial == trial), None)
    known = dict(lane.cost) if lane is not None else {}
    point_id = lane.point_id if lane is not None else ""
    if not known and proposal.point is not None:
        dense = facts.get("parameters_dense")
        reduction = reduction_of(proposal.point, shape, dense)
        if reduction is not None and dense:
            known = {"reduction": reduction, "parameters": dense * (1.0 - reduction)}
        point_id = proposal.point.id
    if start is not None and lane is not None and lane.trial_started_s is not None:
        start = lane.trial_started_s  # a trial that was interrupted keeps its first start in the storage
    return PendingTrial(trial, "queued" if start is None else "running", proposal.origin, point_id, known, start)


def _device(facts: Mapping[str, Any]) -> str:
    """`cuda:0 (NVIDIA H200)`, or the processor's model; "" if unknown."""
    device, environment = str(facts.get("device") or ""), facts.get("environment") or {}
    if device.startswith("cuda"):
        names = [str(gpu.get("name")) for gpu in environment.get("gpus") or [] if isinstance(gpu, Mapping)]
        index = int(device.partition(":")[2] or 0)
        return f"{device} ({names[index]})" if index < len(names) else device
    cpu = (environment.get("cpu") or {}).get("model")
    return f"{device} ({cpu})" if device and cpu else device
