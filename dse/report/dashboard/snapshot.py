"""What the live page shows: a snapshot of a study, and the source that makes snapshots.

Values only: `dse.study` makes the snapshots, so that this package needs neither a study's storage nor its folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import pandas as pd

from dse.evaluation.paired_comparison import Comparison
from dse.pareto.objective import Objective
from dse.report.rank_map import ModelShape
from dse.report.worker_lanes import WorkerLane
from dse.trial_record import TrialRecord

__all__ = ["CostChange", "PairedTrials", "PendingTrial", "StudySnapshot", "StudySource", "VolumeStep"]


@dataclass(frozen=True)
class PendingTrial:
    """A trial without a result.

    Attributes:
        trial: Its number.
        state: `running`, or `queued` behind the running ones.
        origin: Its proposer.
        point_id: Its design point; "" while it is known as levels only.
        known: Column of the trials table to its exact value, such as reduction and parameters.
        started_s: Start of the trial, seconds since the epoch; None in the queue.
    """

    trial: int
    state: Literal["running", "queued"]
    origin: str
    point_id: str = ""
    known: Mapping[str, float] = field(default_factory=dict)
    started_s: float | None = None


@dataclass(frozen=True)
class VolumeStep:
    """The hypervolume after one evaluated trial.

    Attributes:
        trial: Its number.
        origin: The proposer that is credited.
        gained: Normalised hypervolume that it added.
        volume: Normalised hypervolume afterwards.
    """

    trial: int
    origin: str
    gained: float
    volume: float


@dataclass(frozen=True, eq=False)
class StudySnapshot:
    """A study at one moment.

    Attributes:
        version: Changes whenever anything else does.
        trials_version: Changes whenever a trial starts, ends or is revised.
        name: Name of the study.
        directory: Its folder, as the user gave it.
        model: Reference of the model.
        device: Device of the study.
        objectives: Its objectives, at least one.
        trials: The trials table with `on_front` and `tied_with`; empty before the first trial.
        records: Trial number to its record.
        pending: Running and queued trials.
        lanes: Workers.
        steps: The hypervolume after each evaluated trial, in order.
        shape: Layout of the model.
        budget: Number of trials to evaluate.
        evaluated: Number of evaluated trials.
        is_exhausted: Whether the space has no further point.
        read_s: Time of the snapshot, seconds since the epoch.
    """

    version: str
    trials_version: str
    name: str
    directory: str
    model: str
    device: str
    objectives: tuple[Objective, ...]
    trials: pd.DataFrame
    records: Mapping[int, TrialRecord]
    pending: tuple[PendingTrial, ...]
    lanes: tuple[WorkerLane, ...]
    steps: tuple[VolumeStep, ...]
    shape: ModelShape
    budget: int
    evaluated: int
    is_exhausted: bool
    read_s: float

    @property
    def is_complete(self) -> bool:
        """Whether the budget is spent, or the space has no further point."""
        return self.evaluated >= self.budget or self.is_exhausted

    @property
    def running(self) -> tuple[PendingTrial, ...]:
        """Trials in flight."""
        return tuple(trial for trial in self.pending if trial.state == "running")


class CostChange(Protocol):
    """One cost of two trials: see `dse.study.CostComparison`."""

    @property
    def name(self) -> str:
        """The objective."""

    @property
    def first(self) -> float:
        """Value of the first trial."""

    @property
    def second(self) -> float:
        """Value of the second trial."""

    @property
    def ratio(self) -> float:
        """Second over first."""

    @property
    def low(self) -> float | None:
        """Lower end of the ratio's 95 % interval; None if exact or unknown."""

    @property
    def high(self) -> float | None:
        """Upper end."""

    @property
    def is_predicted(self) -> bool:
        """Whether a value was predicted instead of measured."""


class PairedTrials(Protocol):
    """Two trials compared on the same documents: see `dse.study.TrialComparison`."""

    @property
    def quality(self) -> Sequence[Comparison]:
        """Tasks and means, paired by document."""

    @property
    def costs(self) -> Sequence[CostChange]:
        """Costs as ratios."""


class StudySource(Protocol):
    """Makes snapshots of a study that may be running. Its methods may be called from several threads."""

    def snapshot(self) -> StudySnapshot:
        """The present state; the same object while nothing has changed."""

    def compare(self, first: int, second: int) -> PairedTrials:
        """Compare two complete trials.

        Raises:
            UserError: They cannot be compared.
        """
