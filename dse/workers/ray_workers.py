"""Workers as Ray actors. Ray places, restarts and watches them; this module gives out jobs and takes the results."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dse.config import StudyConfig, WorkersConfig
from dse.errors import StudyError
from dse.workers.cache_folder import driver_cache_folder
from dse.workers.driver_desk import DriverDesk
from dse.workers.interface import FinishedJob, Workers
from dse.workers.jobs import EvaluateTrial, Job
from dse.workers.lane_book import LaneBook
from dse.workers.listener import StudyListener
from dse.workers.ray_cluster import RayCall, RayCluster, Share, WorkerLostError, call_actor, connected
from dse.workers.ray_members import Member, Ticket
from dse.workers.same_study import check_same_devices, check_same_facts, check_same_versions, measured_objectives
from dse.workers.study_worker import JobOutcome, Joined, StudyRequest, StudyWorker, WorkerFacts

__all__ = ["RayWorkers", "ray_workers"]

logger = logging.getLogger("dse")

_TICK_S = 0.5
_RETRY_S = 1.0
_MAX_DEATHS = 3
"""Workers that may end in one job before it is given up."""
_MAX_FAILED_STARTS = 5
"""Times in a row that a worker may end before it is ready, before it counts as gone."""
_PATIENCE_S = 60.0


class RayWorkers(Workers):
    """Workers on Ray; made by `ray_workers`."""

    def __init__(
        self,
        cluster: RayCluster,
        share: Share,
        request: StudyRequest,
        settings: WorkersConfig,
        lanes: LaneBook,
        kind: type = StudyWorker,
    ) -> None:
        self.count = share.workers
        self._cluster, self._settings, self._lanes = cluster, settings, lanes
        self._waiting: deque[Ticket] = deque()
        self._given_up: deque[FinishedJob] = deque()
        self._all_busy_s = time.monotonic()
        self._phases: RayCall | None = None
        self._listener = StudyListener()
        self._desk = cluster.start_here(DriverDesk, request.desk, request.cache.path)
        self._members = [Member(index, cluster.start(kind, share, index, request)) for index in range(share.workers)]

    def join_all(self, listener: StudyListener) -> None:
        """Wait until all workers are ready, and measure the sensitivity profile with all of them.

        The first worker prepares the study alone, so that the factor bank is built once; it is one that shares the
        driver's cache folder, if there is one.

        Raises:
            StudyError: A worker runs other versions, has another device or other data, or does not start.
        """
        self._listener = listener
        members = self._members
        listener.on_message(f"starting {self.count} worker{'s' * (self.count > 1)}")
        facts: dict[int, WorkerFacts] = self._each(members, {m.index: ("describe",) for m in members})
        members.sort(key=lambda m: not facts[m.index].shares_cache)
        for member in members:
            member.facts = facts[member.index]
            self._lanes.welcome(member, "prepare")
        self._lanes.write(members)
        check_same_versions([facts[m.index] for m in members])
        first: Joined = self._call_first("join")
        for message in first.messages:
            listener.on_message(message)
        self.outline = first.outline
        self._offer(first.files)
        check_same_devices(first.outline, [facts[m.index] for m in members], self._settings.mixed)
        joined = self._each(members[1:], {m.index: ("join",) for m in members[1:]})
        for member in members:
            self._welcome(member, joined.get(member.index, first))
        known: dict[str, Any] = {}
        shares = {m.index: ("measure_share", m.index, self.count) for m in members}
        for found in self._each(members, shares).values():
            known |= found
        table, messages = self._call_first("table", known)
        for message in messages:
            listener.on_message(message)
        self.outline = dataclasses.replace(self.outline, table=table)
        self._lanes.write(self._members)

    def submit(self, job: Job) -> None:
        """Add a job; it starts when a worker is free."""
        self._waiting.append(Ticket(job))

    def next_finished(self) -> FinishedJob:
        """Wait for a job to finish; one whose worker ended runs again on another."""
        while True:
            self._hand_out()
            if self._given_up:
                return self._given_up.popleft()
            if (finished := self._step()) is not None:
                self._hand_out()  # the free worker need not wait until the driver has stored this result
                return finished

    def finished_in_grace(self) -> Iterator[FinishedJob]:
        """Results that arrive within the period of grace."""
        self._waiting.clear()
        until_s = time.monotonic() + self._settings.grace_s
        in_flight = sum(member.ticket is not None for member in self._members)
        if in_flight and (grace_s := self._settings.grace_s):
            trials = "1 trial has" if in_flight == 1 else f"{in_flight} trials have"
            self._listener.on_message(
                f"stopping: {trials} {grace_s:.0f} s to finish; press Ctrl-C again to stop at once"
            )
        while time.monotonic() < until_s and any(member.ticket is not None for member in self._members):
            finished = self._step()
            self._waiting.clear()
            if finished is not None:
                yield finished

    def check_device(self) -> None:
        """Workers check their own devices; one that lost its device is restarted."""

    def close(self) -> None:
        """End all workers."""
        for member in self._members:
            self._cluster.kill(member.actor, restart=False)
        self._cluster.kill(self._desk, restart=False)
        self._lanes.end(self._members)

    # --- set-up ---

    def _welcome(self, member: Member, joined: Joined) -> None:
        """Accept a worker that is ready, after its first start or a restart.

        Raises:
            StudyError: It differs from the first worker.
        """
        check_same_facts(self.outline.facts, joined.outline.facts, joined.facts.name)
        check_same_devices(self.outline, [self._members[0].facts or joined.facts, joined.facts], self._settings.mixed)
        member.facts, member.is_ready, member.failed_starts = joined.facts, True, 0
        self._lanes.welcome(member)

    def _each(self, members: Sequence[Member], calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method of each worker, and again where the worker ends meanwhile; returns results by index."""
        results: dict[int, Any] = {}
        for member in members:
            member.call = call_actor(member.actor, *calls[member.index])
        while len(results) < len(members):
            waiting = [member for member in members if member.index not in results]
            for member in waiting:
                if member.call is None and time.monotonic() >= member.retry_s:
                    member.call = call_actor(member.actor, *calls[member.index])
            for member in self._done(waiting):
                try:
                    results[member.index] = self._result_of(member)
                except WorkerLostError as error:
                    self._failed_start(member, error)
            self._show_phase(waiting)
        return results

    def _call_first(self, *call: Any) -> Any:
        first = self._members[0]
        return self._each([first], {first.index: call})[first.index]

    def _failed_start(self, member: Member, reason: WorkerLostError) -> None:
        """Count it, and wait longer each time: a shortage of memory or a busy disk may pass."""
        member.retry_s = time.monotonic() + _RETRY_S * 2**member.failed_starts
        if reason.is_starting:
            return
        member.failed_starts += 1
        logger.warning("%s ended before it was ready: %s", member.name, reason)
        if member.failed_starts >= _MAX_FAILED_STARTS:
            raise StudyError(
                f"a worker must start, but {member.name} ended {member.failed_starts} times ({reason}); see the logs of"
                " Ray on its machine"
            )

    def _retire(self, member: Member, reason: StudyError) -> None:
        """Go on without a worker that cannot take part any more.

        Raises:
            StudyError: It was the last one.
        """
        member.is_ready, member.retry_s = False, math.inf
        self._cluster.kill(member.actor, restart=False)
        self._lanes.end([member])
        if all(other.retry_s == math.inf for other in self._members):
            raise reason
        self._listener.on_message(f"going on without {member.name}: {reason}")

    def _show_phase(self, members: Sequence[Member]) -> None:
        phases = self._read_phases()
        for member in members:
            if member.index in phases:
                self._listener.on_phase(*phases[member.index])
                return

    # --- trials ---

    def _hand_out(self) -> None:
        """Give waiting jobs to free workers, the first worker first.

        A worker on another kind of device than the first one's takes the accuracy of trials only.
        """
        for member in self._members:
            if not member.is_ready or member.call is not None:
                continue
            for ticket in self._waiting:
                job = ticket.for_accuracy() if self._is_other(member) else ticket.job
                if job is not None:
                    self._waiting.remove(ticket)
                    member.ticket, member.begun_s = ticket, time.monotonic()
                    member.call = call_actor(member.actor, "run", job)
                    self._lanes.begin(member)
                    break

    def _is_other(self, member: Member) -> bool:
        """Whether the study measures latency or energy and this worker has another device than the first one."""
        first = self._members[0].facts
        differs = member.facts is not None and first is not None and member.facts.device != first.device
        return differs and bool(measured_objectives(self.outline))

    def _step(self) -> FinishedJob | None:
        """Wait a moment for a call to finish; returns a finished job, if any."""
        now = time.monotonic()
        for member in self._members:
            if member.call is None and not member.is_ready and now >= member.retry_s:
                member.call = call_actor(member.actor, "join")
        found: FinishedJob | None = None
        for member in self._done([m for m in self._members if m.call is not None])[:1]:
            found = self._take(member)
        self._end_stuck()
        self._lanes.update(self._members, self._read_phases())
        self._complain_if_alone()
        return found

    def _take(self, member: Member) -> FinishedJob | None:
        ticket, member.ticket = member.ticket, None
        try:
            result = self._result_of(member)
        except WorkerLostError as error:
            member.is_ready, member.retry_s = False, time.monotonic() + _RETRY_S
            if ticket is None:
                try:
                    self._failed_start(member, error)
                except StudyError as reason:
                    self._retire(member, reason)
            elif error.is_starting and ticket.false_starts < _MAX_FAILED_STARTS:  # the job never began
                ticket.false_starts += 1
                self._lanes.fail(member, str(error))
                self._waiting.appendleft(ticket)
            else:
                self._requeue(member, ticket, str(error))
            return None
        if ticket is None:
            try:
                self._welcome(member, result)
            except StudyError as reason:
                self._retire(member, reason)
            return None
        outcome: JobOutcome = result
        for line in outcome.log:
            logger.info("%s: %s", member.name, line)
        self._lanes.finish(member, outcome.result)
        found = outcome.result
        if isinstance(ticket.job, EvaluateTrial) and self._is_other(member) and found.record.state == "complete":
            rest = dataclasses.replace(ticket.job, record=found.record, part="measurements")
            self._waiting.appendleft(Ticket(rest, evaluation=found.evaluation))
            return None
        if ticket.evaluation is not None:
            found = dataclasses.replace(found, evaluation=ticket.evaluation)
        return FinishedJob(ticket.job, found)

    def _requeue(self, member: Member, ticket: Ticket, reason: str) -> None:
        """Let another worker run the job of a worker that ended, unless several have ended in it."""
        ticket.deaths.append(reason)
        what = f"trial {ticket.job.record.trial}" if isinstance(ticket.job, EvaluateTrial) else "a job"
        logger.warning("%s ended in %s: %s", member.name, what, reason)
        self._lanes.fail(member, reason)
        if len(ticket.deaths) >= _MAX_DEATHS:
            self._given_up.append(
                FinishedJob(
                    ticket.job, None, f"{len(ticket.deaths)} workers ended in it, the last one because: {reason}"
                )
            )
            return
        self._listener.on_message(f"{member.name} ended in {what} and restarts; the trial is repeated")
        self._waiting.appendleft(ticket)

    def _end_stuck(self) -> None:
        limit_s = self._settings.trial_timeout_s
        for member in self._members:
            if limit_s is None or member.ticket is None or time.monotonic() - member.begun_s < limit_s:
                continue
            self._cluster.kill(member.actor, restart=True)
            ticket, member.ticket, member.call, member.is_ready = member.ticket, None, None, False
            member.retry_s = time.monotonic() + _RETRY_S
            self._requeue(member, ticket, f"the trial took longer than `trial_timeout_s: {limit_s:g}`")

    def _complain_if_alone(self) -> None:
        """Tell the user if jobs wait and no worker is there, once a minute."""
        now = time.monotonic()
        if any(member.is_ready for member in self._members):
            self._all_busy_s = now
        elif now - self._all_busy_s > _PATIENCE_S:
            self._all_busy_s = now
            self._listener.on_message(f"none of {self.count} workers is ready; waiting for Ray to restart them")

    # --- calls ---

    def _done(self, members: Sequence[Member]) -> list[Member]:
        """Members whose call is finished, after at most a moment."""
        by_call = {member.call: member for member in members if member.call is not None}
        if not by_call:
            time.sleep(_TICK_S)
            return []
        return [by_call[call] for call in self._cluster.wait(list(by_call), _TICK_S)]

    def _result_of(self, member: Member) -> Any:
        call, member.call = member.call, None
        if call is None:
            raise ValueError("a worker without a call has no result")
        return call.result()

    def _offer(self, files: tuple[str, ...]) -> None:
        """Let other machines fetch these files; again if the desk ended and restarts."""
        for attempt in range(_MAX_FAILED_STARTS):
            try:
                call_actor(self._desk, "offer", files).result()
                return
            except WorkerLostError as error:
                logger.warning("the process that serves files to workers ended: %s", error)
                time.sleep(_RETRY_S * (attempt + 1))
        raise StudyError(
            f"a process that serves files must start on the driver's machine, but ended {_MAX_FAILED_STARTS} times; see"
            " the logs of Ray there"
        )

    def _read_phases(self) -> dict[int, tuple[str, int, int]]:
        """The latest report of each worker; a report that has not arrived yet is not awaited."""
        phases: dict[int, tuple[str, int, int]] = {}
        if self._phases is not None and self._cluster.wait([self._phases], 0):
            with contextlib.suppress(WorkerLostError):
                phases = self._phases.result()
            self._phases = None
        if self._phases is None:
            self._phases = call_actor(self._desk, "phases")
        return phases


@contextlib.contextmanager
def ray_workers(
    config: StudyConfig,
    settings: WorkersConfig,
    listener: StudyListener,
    lanes: Path,
    started_with: Sequence[str] | None,
    answers: Path | None,
) -> Iterator[RayWorkers]:
    """Start workers for a study and prepare it on them; they end with the block.

    Args:
        config: The study.
        settings: Its workers.
        listener: Receives progress.
        lanes: The file with the state of each worker.
        started_with: Objectives of the existing trials; None for a new study.
        answers: Folder of answers if the user's cache is not used; None if it is.

    Raises:
        UserError: Ray, a worker or a part of the study is not possible.
    """
    with connected(settings) as cluster, driver_cache_folder(settings) as cache:
        share = cluster.share()
        with_device = tuple(started_with) if started_with is not None else None
        request = StudyRequest(config, with_device, answers, share.threads, cache, f"dse-desk-{uuid.uuid4().hex}")
        workers = RayWorkers(cluster, share, request, settings, LaneBook(lanes))
        try:
            workers.join_all(listener)
            yield workers
        finally:
            workers.close()
