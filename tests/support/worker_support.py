"""Studies on Ray workers in tests: a cluster of several nodes on this machine, and faults at chosen moments."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_study import tiny_study

from dse.study import Study
from dse.trial_record import EVALUATED_STATES


def worker_study(folder: Path, trials: int, **changes: Any) -> dict[str, Any]:
    """A study whose points depend on no result, so that every order of trials has the same ones."""
    return tiny_study(folder, search="off", budget={"trials": trials}, **changes)


def outcome(study: Study) -> tuple[list[tuple[str, float | None]], list[str]]:
    """Evaluated points with their accuracies, and the points on the front, both sorted."""
    evaluated = [(r.point_id, r.value("accuracy")) for r in study.records if r.state in EVALUATED_STATES]
    return sorted(evaluated), sorted(record.point_id for record in study.front_records)


def check_complete(study: Study, trials: int, undisturbed: Study) -> None:
    """Nothing is lost, nothing is evaluated twice, the count is complete, and the front is the undisturbed one."""
    points = [record.point_id for record in study.records if record.state in EVALUATED_STATES]
    assert len(points) == trials
    assert len(set(points)) == trials
    assert outcome(study) == outcome(undisturbed)


@dataclass(frozen=True)
class Lane:
    worker: str
    pid: int
    phase: str
    trial: int | None
    failures: int


def lanes(study: Path) -> list[Lane]:
    """What the workers of the study in this folder do, as `workers.json` tells."""
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads((study / "workers.json").read_text(encoding="utf-8"))["workers"]
        return [
            Lane(e["worker"], e["pid"], e["phase"], e["trial"], e["failures"])
            for e in entries
            if e["pid"] is not None and e["state"] != "ended"
        ]
    return []


@dataclass
class Killer:
    """A thread that kills workers of a study at random moments; no trial loses more than two workers.

    Attributes:
        study: The study's folder.
        kills: Number of kills after which it stops.
        seed: Seed of moments and victims.
        log: Worker, phase and trial of each kill.
    """

    study: Path
    kills: int
    seed: int = 0
    between_s: tuple[float, float] = (0.2, 3.0)
    log: list[Lane] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Killer]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        generator, dead = random.Random(self.seed), set[int]()
        while len(self.log) < self.kills and not self._stop.wait(generator.uniform(*self.between_s)):
            spared = {trial for trial in (e.trial for e in self.log) if self._killed(trial) >= 2}
            found = [lane for lane in lanes(self.study) if lane.pid not in dead and lane.trial not in spared]
            if not found:
                continue
            victim = generator.choice(found)
            dead.add(victim.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
                self.log.append(victim)

    def _killed(self, trial: int | None) -> int:
        return 0 if trial is None else sum(entry.trial == trial for entry in self.log)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            raise AssertionError(f"not within {timeout_s:.0f} s")
        time.sleep(0.05)
