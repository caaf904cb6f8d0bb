"""Disturb studies on Ray workers at random moments, and count what is lost.

    python benchmarks/worker_kills.py [--kills 120] [--minutes 20] [--seed 0] [--out runs/worker_kills]

Studies of a tiny model run on a Ray cluster of several nodes on this machine, one after another, until enough
disturbances have happened. Every kind of study has its own disturbances:

    plain      several workers; SIGKILL of a worker, of a whole node, or of the driver, which is started again with
               fewer or more workers; SIGSTOP of a worker in a trial, which `trial_timeout_s` ends
    search     one worker with sensitivity profile, allocation and refinement; SIGKILL of the worker or the driver
    measured   a third as long; latency is an objective, too; SIGKILL of a worker or the driver
    database   the study is stored in PostgreSQL; SIGQUIT of the server, which is started again; SIGKILL of a worker
    disk       the study's folder is on a small disk, which is filled until the driver ends, then emptied
    memory     a process takes memory until Ray ends a worker for lack of it

Moments and victims are random. A trial loses at most two workers, since a third one would end it, and at most three
workers in a row die outside of trials, since a worker that ends five times before it is ready is given up. After each
study these must hold: every budgeted trial is there, no point was evaluated twice, no finished record was lost or
changed, and points, accuracies and front are those of an undisturbed study (of a measured study, points and
accuracies).

Every finished study is one line of `studies.jsonl` in the output folder; another call adds more. Prints one line per
study, then all disturbances so far by kind and by what the worker did; the last line is one JSON document. Exits with 1
if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import psutil
from postgres_server import PASSWORD, PostgresServer, cannot_run
from preloaded_python import Process, accept_noisy_latencies
from study_support import fill_disk
from tiny_models import save_tiny_model
from tiny_study import environment, save_choice_task, tiny_study, write_study
from worker_support import RayNodes, WorkerProcess, lanes, outcome, ray_nodes, worker_study

from dse.errors import StudyError
from dse.study import Study, open_study, run_study
from dse.trial_record import EVALUATED_STATES

KINDS: dict[str, dict[str, int]] = {
    "plain": {"worker": 4, "node": 1, "driver": 1, "hang": 3},
    "search": {"worker": 3, "driver": 1},
    "measured": {"worker": 3, "driver": 1},
    "database": {"database": 2, "worker": 1},
    "disk": {"disk": 2, "worker": 1},
    "memory": {"memory": 1},
}
"""Kind of study to its disturbances and how often each comes."""

_BETWEEN_S = (0.2, 3.0)
_PER_STUDY = 25
_TIMEOUT_S = 25
_SLOW_S = 0.5
"""How much longer a trial takes, so that more disturbances fall into one."""
_MEMORY_BYTES = 3 * 2**29
_MAX_DEATHS, _MAX_STARTS, _MAX_DRIVERS = 2, 3, 2


class Disturbance:
    """One study, disturbed until it is complete."""

    def __init__(self, kind: str, nodes: RayNodes, folder: Path, out: Path, trials: int, seed: int) -> None:
        self._kind, self._nodes, self._out = kind, nodes, out
        self._generator = random.Random(seed)
        self._config = config_of(kind, folder, trials)
        self._stack = contextlib.ExitStack()
        self._server: PostgresServer | None = None
        self._count = 1 if kind == "search" else 2
        self._deaths: Counter[int | None] = Counter()
        self._log = folder / f"{out.name}.log"
        self.kills: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.lost: list[str] = []

    def run(self, limit: int) -> Study:
        """Run the study to its end, with at most this many disturbances."""
        with self._stack:
            self._prepare()
            known: dict[int, Any] = {}
            while True:
                status = self._drive(limit)
                found: dict[int, Any] = {}
                with contextlib.suppress(StudyError):  # it ended before the first trial
                    found = {record.trial: record for record in open_study(self._out).records}
                gone = [trial for trial, record in known.items() if found.get(trial) != record]
                self.lost += [f"the record of trial {trial} is lost or changed" for trial in gone]
                known = found
                if status == 0:
                    return self._checked()
                if status != -signal.SIGKILL and not (self._kind in ("disk", "database") and status == 2):
                    raise RuntimeError(f"dse run ended with {status}; see {self._log}")
                if self._kind not in ("search", "disk"):
                    self._count = self._generator.choice([n for n in (1, 2, 3) if n != self._count])

    def _exists(self) -> bool:
        return (self._out / "study.db").exists() or (self._out / "storage.json").exists()

    def _checked(self) -> Study:
        """Keep the result in memory: database and disk end with this block."""
        study = open_study(self._out)
        _ = study.front_records
        return study

    def _prepare(self) -> None:
        if self._kind == "database":
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dse-postgresql-")))
            folder.chmod(0o755)
            self._server = PostgresServer.create(folder / "server")
            self._stack.callback(self._server.kill)
            self._config["storage"] = self._server.url
        if self._kind == "disk":
            self._out.parent.joinpath("disk").mkdir(exist_ok=True)
            disk = self._out.parent / "disk"
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
            self._stack.callback(subprocess.run, ["umount", str(disk)], check=True)
            self._out = disk / "run"
        if self._kind == "memory":
            memory = psutil.virtual_memory()
            share = (memory.total - memory.available + _MEMORY_BYTES) / memory.total
            node = self._nodes.add(
                {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "50"}
            )
            self._stack.callback(self._nodes.remove, node)
            self._count = len(self._nodes.nodes)
        self._config["workers"] = self._nodes.keys(self._count, slow_s=_SLOW_S, trial_timeout_s=_TIMEOUT_S)

    def _drive(self, limit: int) -> int:
        """Run the driver, and disturb it on the way; returns its exit status."""
        study = write_study(self._log.with_suffix(".yaml"), self._config)
        command = ["-m", "dse.cli", "run", str(study), "--out", str(self._out), "--no-cache"]
        command += ["--workers", str(self._count)]
        variables = {**self._nodes.environment, "PGPASSWORD": PASSWORD}
        driver = self._nodes.preloaded.start(command, variables, self._log)
        while (status := driver.wait(self._generator.uniform(*_BETWEEN_S))) is None:
            if self.kills.total() >= limit:
                continue
            kinds = KINDS[self._kind]
            kind = self._generator.choices(list(kinds), list(kinds.values()))[0]
            if kind == "driver" and self.kills[kind] >= _MAX_DRIVERS:
                kind = "worker"
            with self._counted(kind):
                getattr(self, f"_disturb_{kind}")(driver)
        return status

    @contextlib.contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        try:
            yield
        except LookupError:  # no process of this kind runs now
            return
        self.kills[kind] += 1

    # --- disturbances ---

    def _disturb_worker(self, _: Process) -> None:
        victim, phase = self._victim(self._nodes.workers())
        if not victim.send(signal.SIGKILL):
            raise LookupError
        self.phases[phase] += 1

    def _disturb_hang(self, _: Process) -> None:
        victim, _ = self._victim([worker for worker in self._nodes.workers() if worker.method == "run"])
        if not victim.send(signal.SIGSTOP):
            raise LookupError

    def _disturb_node(self, _: Process) -> None:
        self._nodes.remove(self._generator.choice(self._nodes.nodes))
        self._nodes.add()

    def _disturb_driver(self, driver: Process) -> None:
        driver.kill()

    def _disturb_database(self, _: Process) -> None:
        if self._server is None or not self._exists():  # a new study does not wait for a database
            raise LookupError
        self._server.kill()
        time.sleep(self._generator.uniform(0.5, 4.0))
        self._server.start()

    def _disturb_disk(self, driver: Process) -> None:
        if not self._exists():
            raise LookupError
        filler = self._out.parent / "filler"
        fill_disk(filler)
        driver.wait(60)
        filler.unlink()

    def _disturb_memory(self, _: Process) -> None:
        """Take memory until Ray has ended a worker."""
        before = {worker.pid for worker in self._nodes.workers()}
        if psutil.virtual_memory().available < 3 * _MEMORY_BYTES:
            raise LookupError
        hog = subprocess.Popen(
            [sys.executable, "-c", f"x = b'x' * {2 * _MEMORY_BYTES}; import time; time.sleep(20)"],
        )
        try:
            until_s = time.monotonic() + 15
            while before <= {worker.pid for worker in self._nodes.workers()}:
                if time.monotonic() > until_s:
                    raise LookupError
                time.sleep(0.05)
        finally:
            hog.kill()
            hog.wait()

    def _victim(self, workers: list[WorkerProcess]) -> tuple[WorkerProcess, str]:
        """A worker, and what it does. A trial loses at most two workers."""
        working = {lane.pid: lane for lane in lanes(self._out)}
        victim = self._generator.choice(workers) if workers else None
        if victim is None:
            raise LookupError
        lane = working.get(victim.pid)
        phase, trial = victim.method or "idle", None
        if victim.method == "run" and lane is not None:
            phase, trial = lane.phase or "run", lane.trial
        if self._deaths[trial] >= (_MAX_STARTS if trial is None else _MAX_DEATHS):
            raise LookupError
        self._deaths[trial] += 1
        if trial is not None:
            self._deaths[None] = 0
        return victim, phase


def config_of(kind: str, folder: Path, trials: int) -> dict[str, Any]:
    if kind == "search":
        return tiny_study(folder, sampler={"name": "tpe"}, budget={"trials": trials})
    if kind == "measured":
        return worker_study(folder, trials // 3, objectives=["accuracy", "decode_latency_s", "parameters"])
    return worker_study(folder, trials)


def lost(study: Study, undisturbed: Study, kind: str) -> list[str]:
    """What does not hold. The first points of a measured study are those of a plain one."""
    points = [record.point_id for record in study.records if record.state in EVALUATED_STATES]
    broken = [f"trial {r.trial} failed: {r.reason}" for r in study.records if r.state == "failed"]
    if len(points) != study.config.budget.trials:
        broken.append(f"{len(points)} trials instead of {study.config.budget.trials}")
    if len(set(points)) != len(points):
        broken.append("a point was evaluated twice")
    here, there = outcome(study), outcome(undisturbed)
    if kind == "measured":
        return broken + ["points or accuracies differ"] * (not set(here[0]) <= set(there[0]))
    return broken + ["points, accuracies or front differ"] * (here != there)


def summary(path: Path) -> dict[str, Any]:
    """All studies so far, as a table on stdout and a document."""
    studies = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kills: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    for study in studies:
        kills.update(study["kills"])
        phases.update(study["phases"])
    for name, count in kills.most_common():
        print(f"{name:<16}{count:>5}")
    print("what killed workers did:")
    for name, count in phases.most_common():
        print(f"  {name:<20}{count:>5}")
    return {
        "disturbances": kills.total(),
        "kinds": dict(kills),
        "phases": dict(phases),
        "studies": dict(Counter(study["kind"] for study in studies)),
        "trials": sum(study["trials"] for study in studies),
        "lost": [f"{study['name']}: {what}" for study in studies for what in study["lost"]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/worker_kills"))
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_tiny_model(folder / "model")
        save_choice_task(folder, documents=96)
    os.environ.update(environment(folder) | {"PGPASSWORD": PASSWORD})
    accept_noisy_latencies()
    kinds = [kind for kind in options.kinds if kind != "database" or not cannot_run()]
    results, end_s = folder / "studies.jsonl", time.monotonic() + 60 * options.minutes
    undisturbed = {}
    for kind in kinds:
        alike = kind if kind == "search" else "plain"
        place = folder / f"undisturbed-{alike}-{options.trials}"
        if not (place / "front.html").exists():  # written last
            run_study(config_of(alike, folder, options.trials), out=place, use_cache=False)
        undisturbed[kind] = open_study(place)
    with ray_nodes(folder, 3) as nodes:
        number = len(results.read_text().splitlines()) if results.exists() else 0
        while time.monotonic() < end_s:
            done = (
                sum(sum(json.loads(line)["kills"].values()) for line in results.read_text().splitlines())
                if number
                else 0
            )
            if done >= options.kills:
                break
            kind = kinds[number % len(kinds)]
            out = folder / f"{kind}-{options.seed}-{number}-{os.getpid()}"
            begin_s = time.monotonic()
            disturbance = Disturbance(kind, nodes, folder, out, options.trials, options.seed + number)
            study = disturbance.run(min(_PER_STUDY, options.kills - done))
            line = {
                "name": out.name,
                "kind": kind,
                "kills": dict(disturbance.kills),
                "phases": dict(disturbance.phases),
                "trials": study.evaluated_trials,
                "lost": disturbance.lost + lost(study, undisturbed[kind], kind),
                "wall_s": round(time.monotonic() - begin_s),
            }
            with results.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            number += 1
    document = summary(results)
    print(json.dumps(document))
    return 1 if document["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
