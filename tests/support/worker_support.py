"""Studies on Ray workers in tests: a cluster of several nodes on this machine, and what its workers do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from preloaded_python import Preloaded
from tiny_study import environment, tiny_study

from dse.study import Study
from dse.trial_record import EVALUATED_STATES

_START_S = 300.0
_SLOW_JOBS = """
import time
from dse.workers.study_worker import StudyWorker
StudyWorker.run = (lambda run: lambda self, job: (time.sleep({}), run(self, job))[1])(StudyWorker.run)
"""


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


class RayNodes:
    """A Ray cluster on this machine: a head without devices, and nodes with one pretended GPU each.

    Args:
        cache: Cache folders of dse and Hugging Face.
        nodes: Number of nodes beside the head.
    """

    def __init__(self, cache: Path, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        self._folder = Path(tempfile.mkdtemp(prefix="dse-"))
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        self.environment = environment(cache) | settings
        self.preloaded = Preloaded(self._folder, self.environment)
        os.environ.update(self.environment)
        self.nodes: list[Any] = []
        self._special: list[Any] = []
        self._cluster = Cluster()
        try:
            self._start(num_cpus=0, num_gpus=0, include_dashboard=False)
            for _ in range(nodes):
                self.add()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, variables: Mapping[str, str] | None = None) -> Any:
        """Add a node; its workers have these environment variables."""
        node = self._start(num_cpus=1, num_gpus=1, env_vars=dict(variables or {}))
        self.nodes.append(node)
        return node

    @contextlib.contextmanager
    def replaced(self, variables: Mapping[str, str]) -> Iterator[None]:
        """A node with these environment variables in the place of a plain one."""
        self.remove(next(node for node in self.nodes if node not in self._special))
        node = self.add(variables)
        self._special.append(node)
        yield
        self._special.remove(node)
        self.remove(node)
        self.add()

    def _start(self, **settings: Any) -> Any:
        """Start a node; on a busy machine that takes longer than the 30 seconds that Ray grants by default."""
        node = self._cluster.add_node(wait=False, **settings)
        self._cluster.wait_for_nodes(timeout=_START_S)
        return node

    def remove(self, node: Any) -> None:
        """End all processes of a node at once."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def keys(self, count: int, *, slow_s: float = 0.0, **keys: Any) -> dict[str, Any]:
        """Keys of a study's `workers`; a job takes `slow_s` longer, so that a signal arrives before it ends."""
        started_by: dict[str, Any] = {"py_executable": str(self.preloaded.executable)}
        if slow_s:
            started_by["env_vars"] = {"PRELOADED_FIRST": _SLOW_JOBS.format(slow_s)}
        return {"ray_address": self.address, "count": count, "runtime_env": started_by, **keys}

    def workers(self) -> list[WorkerProcess]:
        """The processes of all workers."""
        found = []
        for process in psutil.Process(self.preloaded.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                title = process.cmdline()[0].strip()
                if title.startswith("ray::StudyWorker"):
                    found.append(WorkerProcess(process.pid, title.partition(".")[2].split("(")[0]))
        return found

    def kill_within(self, worker: WorkerProcess, method: str) -> bool:
        """Kill a worker that executes this method; stopped first, so that it does not finish meanwhile.

        If it dies within milliseconds of the start, the driver may not know yet that the job began.
        """
        if worker.method != method:
            return False
        time.sleep(0.5)
        if worker not in self.workers() or not worker.send(signal.SIGSTOP):
            return False
        still = worker in self.workers()
        worker.send(signal.SIGKILL if still else signal.SIGCONT)
        return still

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()
        self.preloaded.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class WorkerProcess:
    """A worker's process.

    Attributes:
        pid: Its id.
        method: What it executes: `__init__`, `describe`, `join`, `measure_share`, `table` or `run`; "" if it waits.
    """

    pid: int
    method: str

    def send(self, number: int) -> bool:
        """Send a signal; returns whether the process was there."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


@contextlib.contextmanager
def ray_nodes(cache: Path, nodes: int) -> Iterator[RayNodes]:
    before = dict(os.environ)
    created = RayNodes(cache, nodes)
    try:
        yield created
    finally:
        created.close()
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Lane:
    worker: str
    pid: int
    phase: str
    trial: int | None
    failures: int
    finished: int


def lanes(study: Path) -> list[Lane]:
    """What the workers of the study in this folder do, as `workers.json` tells."""
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads((study / "workers.json").read_text(encoding="utf-8"))["workers"]
        return [
            Lane(e["worker"], e["pid"], e["phase"], e["trial"], e["failures"], e["finished"])
            for e in entries
            if e["pid"] is not None and e["state"] != "ended"
        ]
    return []


def wait_until(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            raise AssertionError(f"not within {timeout_s:.0f} s")
        time.sleep(0.02)
