"""What the driver knows of each worker on Ray, and of each job."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dse.evaluation import EvaluationResult
from dse.workers.jobs import EvaluateTrial, Job
from dse.workers.ray_cluster import RayCall
from dse.workers.study_worker import WorkerFacts

__all__ = ["Member", "Ticket"]


@dataclass
class Ticket:
    """A submitted job.

    Attributes:
        job: The job.
        deaths: Why the workers that ran it ended.
        false_starts: How many workers ended when they were about to run it.
        evaluation: The evaluation of a trial whose measurements are still to be taken.
    """

    job: Job
    deaths: list[str] = field(default_factory=list)
    false_starts: int = 0
    evaluation: EvaluationResult | None = None

    def for_accuracy(self) -> Job | None:
        """The part of a trial that does not depend on the device; None if there is none."""
        job = self.job
        if isinstance(job, EvaluateTrial) and job.part == "all" and job.baseline is not None:
            return dataclasses.replace(job, part="accuracy")
        return None


@dataclass
class Member:
    """One worker.

    Attributes:
        index: Its number.
        actor: Its actor.
        facts: Who it is; None before it has said so.
        is_ready: Whether it takes jobs.
        call: The call that is under way.
        ticket: The job that it runs.
        begun_s: When the job began.
        failed_starts: Times in a row that it ended before it was ready.
        retry_s: When to ask it again whether it is ready; infinite for a worker that is gone for good.
    """

    index: int
    actor: Any
    facts: WorkerFacts | None = None
    is_ready: bool = False
    call: RayCall | None = None
    ticket: Ticket | None = None
    begun_s: float = 0.0
    failed_starts: int = 0
    retry_s: float = 0.0

    @property
    def name(self) -> str:
        """`worker 3 on host`."""
        return f"worker {self.index + 1}" + (f" on {self.facts.host}" if self.facts else "")
