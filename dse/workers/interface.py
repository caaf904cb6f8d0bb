"""The interface between driver and workers, and its implementation in the driver's own process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dse.errors import StudyError
from dse.workers.jobs import Job
from dse.workers.listener import Interrupts, StudyListener
from dse.workers.outline import StudyOutline
from dse.workers.setup import PreparedStudy

__all__ = ["FinishedJob", "LocalWorker", "Workers"]


@dataclass(frozen=True)
class FinishedJob:
    """A job and its result.

    Attributes:
        job: The job as it was submitted.
        result: What its `run` returned.
        gave_up: Why the job was given up because several workers ended in it; "" otherwise. Its result is then None.
    """

    job: Job
    result: Any
    gave_up: str = ""


class Workers(ABC):
    """Runs jobs on resident models. The driver calls it from one thread.

    Attributes:
        outline: The study as the workers have prepared it.
        count: Number of workers.
    """

    outline: StudyOutline
    count: int

    @property
    def slots(self) -> int:
        """Jobs that may be submitted and unfinished: one per worker and, beside others, one that waits.

        A single worker has none that waits: each proposal then knows all earlier results.
        """
        return self.count + (self.count > 1)

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Add a job to those to run."""

    @abstractmethod
    def next_finished(self) -> FinishedJob:
        """Wait for a submitted job to finish; jobs may finish in any order.

        Raises:
            DseError: The job's own error.
            UserError: No worker can go on.
            KeyboardInterrupt: The user stops the study.
        """

    @abstractmethod
    def check_device(self) -> None:
        """Check that the device responds, after a failed trial.

        Raises:
            StudyError: The device is lost, and with it every further trial of this process.
        """

    def finished_in_grace(self) -> Iterator[FinishedJob]:
        """Jobs that finish soon, after the user has stopped the study; those that only wait do not start."""
        return iter(())

    def run(self, job: Job) -> Any:
        """Run one job while no other is submitted, and return its result.

        Raises:
            StudyError: Several workers ended in this job.
        """
        self.submit(job)
        finished = self.next_finished()
        if finished.gave_up:
            raise StudyError(f"the study cannot go on: {finished.gave_up}")
        return finished.result


class LocalWorker(Workers):
    """One worker in this process: `next_finished` runs the job."""

    def __init__(self, prepared: PreparedStudy, listener: StudyListener, interrupts: Interrupts) -> None:
        self.outline, self.count = StudyOutline.of(prepared), 1
        self._prepared, self._listener, self._interrupts = prepared, listener, interrupts
        self._submitted: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Add a job."""
        self._submitted.append(job)

    def next_finished(self) -> FinishedJob:
        """Run the oldest submitted job."""
        job = self._submitted.popleft()
        finished = FinishedJob(job, job.run(self._prepared, self._listener))
        self._interrupts.check()  # a library may have turned the interrupt into an error of its own
        return finished

    def check_device(self) -> None:
        """Check the model's device."""
        self._prepared.evaluator.check_device()
