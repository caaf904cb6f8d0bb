"""What the driver costs: efficiency of many workers, its own time per trial, and what parallelism costs in quality.

    python benchmarks/scale.py [--workers 1 2 8 64] [--seconds 0.5 5] [--ray] [--trials 1000 10000] [--seeds 10]

Driver, search and storage are the real ones; no model is evaluated.

Efficiency is busy time / (wall time x workers), from the moment when every worker has begun its first trial until the
last trial is given out; the time before that is reported beside it. A trial's duration is Pareto-distributed around the
mean, at most five times it. By default a virtual clock adds the durations of trials to the processor time of the
driver, so that other programs on the machine do not count, nor does the disk. `--ray` takes real time with Ray actors
that sleep.

The driver's own time is its processor time per trial at each size of the study: the median over 50 trials, and the
mean, which includes the tables that are written now and then. Trials beyond the first hundred are copies of those,
written by SQL.

Quality: hypervolume after 24 and 60 evaluations with 1 and 8 trials in flight, over seeds. The damage of a point is a
sum over tensors of (1 - kept energy) with weights by depth and role, and an interaction between neighbouring layers,
fitted to nothing: it stands in for the problem of `benchmarks/search.py`, whose every evaluation takes seconds.

Prints tables; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import numpy as np
from preloaded_python import Preloaded

from dse.config import StudyConfig, WorkersConfig, parse_study
from dse.design_point import DesignPoint
from dse.evaluation.statistics.intervals import Interval
from dse.pareto import normalised_hypervolume, objectives_named
from dse.search.spaces.base import SearchSpace
from dse.standalone.model_request import ModelRequest
from dse.study.driver import StudyDriver
from dse.study.folder import StudyFolder
from dse.study.resume import resume_or_start
from dse.study.study import open_study
from dse.topology import Topology
from dse.trial.measurement_plan import MeasurementPlan
from dse.trial_record import EVALUATED_STATES, TrialRecord
from dse.workers.cache_folder import CacheFolder
from dse.workers.interface import FinishedJob, Workers
from dse.workers.jobs import EvaluateTrial, Job, TrialResult
from dse.workers.lane_book import LaneBook
from dse.workers.listener import Interrupts, StudyListener
from dse.workers.outline import StudyOutline
from dse.workers.ray_cluster import connected
from dse.workers.ray_workers import RayWorkers
from dse.workers.same_study import MUST_STAY
from dse.workers.study_worker import JobOutcome, Joined, StudyRequest, WorkerFacts

LONGEST = 5.0
"""Longest trial, in means."""
FIRST, MEASURED = 101, 50
"""Trials that are run before the study is multiplied, and after it."""
EVALUATIONS = (24, 60)

Row = dict[str, float]


def duration_s(mean_s: float, point_id: str) -> float:
    """Pareto-distributed with this mean, cut at five times it; it depends on the point alone."""
    draw = random.Random(point_id).paretovariate(2.5)
    return mean_s * min(LONGEST, 0.6 * draw)


def result_of(job: EvaluateTrial, topology: Topology | None = None) -> TrialResult:
    """A record whose accuracy depends on the point alone."""
    record = job.record
    if topology is not None:
        accuracy = 0.7 * math.exp(-damage(record.point, topology))
    else:
        noise = int(hashlib.sha256(record.point_id.encode()).hexdigest()[:8], 16) / 2**32
        accuracy = 0.7 - record.cost["reduction"] * (0.5 + noise)
    quantities = {"accuracy": Interval(accuracy, accuracy - 0.02, accuracy + 0.02)}
    return TrialResult(dataclasses.replace(record, state="complete", quantities=quantities), None)


def damage(point: DesignPoint, topology: Topology) -> float:
    """A made-up loss: steeper for small ranks, first and last layers and value-like roles; neighbours add up."""
    by_layer: dict[int, float] = {}
    for name, choice in point.items():
        tensor = topology.decomposable(name)
        kept = (choice.rank or 0) / min(tensor.shape[-2:])
        role = 1.0 + int(hashlib.sha256(tensor.role.encode()).hexdigest()[:4], 16) / 2**16
        depth = 1.0 + 2.0 * abs(2 * (tensor.layer or 0) / max(1, topology.layer_count - 1) - 1) ** 3
        by_layer[tensor.layer or 0] = by_layer.get(tensor.layer or 0, 0.0) + role * depth * (1 - kept) ** 2
    neighbours = sum(by_layer[layer] * by_layer.get(layer + 1, 0.0) for layer in by_layer)
    return 0.004 * sum(by_layer.values()) + 0.0005 * neighbours


# --- workers ---


class VirtualWorkers(Workers):
    """Workers whose trials take no time. A clock adds their durations to the processor time of the driver."""

    def __init__(
        self, outline: StudyOutline, count: int, mean_s: float = 1.0, topology: Topology | None = None
    ) -> None:
        self.outline, self.count = outline, count
        self.submitted_s = 0.0
        self.intervals: list[tuple[float, float]] = []
        self.driver_s: list[float] = []
        self._mean_s, self._topology = mean_s, topology
        self._now_s, self._mark_s, self._number = 0.0, time.process_time(), 0
        self._running: list[tuple[float, int, Job]] = []
        self._waiting: list[Job] = []

    def submit(self, job: Job) -> None:
        self._advance()
        self._waiting.append(job)
        self.submitted_s = self._now_s
        self._start()

    def next_finished(self) -> FinishedJob:
        self._advance()
        self.driver_s.append(time.process_time())
        end_s, _, job = heapq.heappop(self._running)
        self._now_s = max(self._now_s, end_s)
        self._start()
        self._mark_s = time.process_time()
        return FinishedJob(job, result_of(job, self._topology) if isinstance(job, EvaluateTrial) else None)

    def check_device(self) -> None:
        """Nothing to check."""

    def _advance(self) -> None:
        now_s = time.process_time()
        self._now_s += now_s - self._mark_s
        self._mark_s = now_s

    def _start(self) -> None:
        while self._waiting and len(self._running) < self.count:
            job, self._number, end_s = self._waiting.pop(0), self._number + 1, self._now_s
            if isinstance(job, EvaluateTrial) and job.baseline is not None:
                end_s += duration_s(self._mean_s, job.record.point_id)
                self.intervals.append((self._now_s, end_s))
            heapq.heappush(self._running, (end_s, self._number, job))


@dataclass(frozen=True)
class SleepingRequest(StudyRequest):
    """What a sleeping worker knows."""

    outline: StudyOutline | None = None
    mean_s: float = 1.0


class SleepingWorker:
    """The actor that sleeps."""

    def __init__(self, index: int, request: SleepingRequest) -> None:
        self._request = request
        self._facts = WorkerFacts({}, "here", index, "none", shares_cache=True)

    def ping(self) -> None:
        """Answer."""

    def describe(self) -> WorkerFacts:
        return self._facts

    def join(self) -> Joined:
        return Joined(self._facts, self._request.outline, (), ())  # type: ignore[arg-type]

    def measure_share(self, index: int, count: int) -> dict[str, Any]:
        return {}

    def table(self, known: Any) -> tuple[None, list[str]]:
        return None, []

    def run(self, job: Job) -> JobOutcome:
        if not isinstance(job, EvaluateTrial):
            return JobOutcome(None)
        begin_s = time.time()
        if job.baseline is not None:
            time.sleep(duration_s(self._request.mean_s, job.record.point_id))
        result = result_of(job)
        seconds = {"begin": begin_s, "total": time.time() - begin_s}
        return JobOutcome(dataclasses.replace(result, record=dataclasses.replace(result.record, seconds=seconds)))


class ObservedWorkers(RayWorkers):
    """Notes when trials ran and when the last one was submitted."""

    submitted_s = 0.0
    intervals: list[tuple[float, float]]

    def submit(self, job: Job) -> None:
        super().submit(job)
        if isinstance(job, EvaluateTrial):
            self.submitted_s = time.time()

    def next_finished(self) -> FinishedJob:
        finished = super().next_finished()
        if isinstance(finished.job, EvaluateTrial) and finished.job.baseline is not None:
            seconds = finished.result.record.seconds
            self.intervals.append((seconds["begin"], seconds["begin"] + seconds["total"]))
        return finished


# --- studies ---


def study(trials: int, sampler: str, seed: int = 0, search: str = "off") -> StudyConfig:
    """Twelve parameters, as the default space has."""
    return parse_study(
        {
            "name": "scale",
            "model": "demo:smollm2-135m-instruct",
            "space": {
                "name": "scale",
                "methods": ["svd"],
                "groups": {"layers": 5, "roles": {"attention": ["query", "attention_output"], "mlp": ["gate", "up"]}},
                "ranks": {"kept_fractions": [0.8, 0.6, 0.4, 0.2]},
                "limits": {"reduction": {"max": 0.4}},
            },
            "objectives": ["accuracy", "parameters"],
            "tasks": ["arc_easy"],
            "sampler": {"name": sampler, "seed": seed},
            "search": search,
            "budget": {"trials": trials},
        }
    )


def outline_of(config: StudyConfig) -> StudyOutline:
    topology = ModelRequest(config.model.ref).topology()
    space = SearchSpace.from_config(config.constrained_space, topology)
    objectives = objectives_named([entry.name for entry in config.objectives])
    return StudyOutline(
        config, topology, space, objectives, MeasurementPlan.of(config, None), (), None, dict.fromkeys(MUST_STAY), False
    )


def drive(workers: Workers, out: Path) -> None:
    folder = StudyFolder(out)
    out.mkdir(parents=True, exist_ok=True)
    folder.write_config(workers.outline.config)
    driver = StudyDriver(workers, folder, StudyListener(), Interrupts())
    with driver.closing():
        driver.search_until_spent(resume_or_start(driver))


# --- measurements ---


def efficiency_of(workers: VirtualWorkers | ObservedWorkers) -> tuple[float, float]:
    """Efficiency, and the seconds until every worker had begun its first trial."""
    begun = sorted(begin for begin, _ in workers.intervals)
    first_s, last_s = begun[workers.count - 1], workers.submitted_s
    busy_s = sum(max(0.0, min(end, last_s) - max(begin, first_s)) for begin, end in workers.intervals)
    return busy_s / ((last_s - first_s) * workers.count), first_s - begun[0]


def efficiencies(options: argparse.Namespace, place: Path) -> list[Row]:
    rows = []
    with ray_workers(place) if options.ray else contextlib.nullcontext(None) as executable:
        for count, mean_s in itertools.product(options.workers, options.seconds):
            out = place / f"{count}-{mean_s}"
            outline = outline_of(study(1 + (options.per_worker + 1) * count, options.sampler))
            workers: VirtualWorkers | ObservedWorkers
            if executable is None:
                workers = VirtualWorkers(outline, count, mean_s)
                drive(workers, out)
            else:
                workers = drive_on_ray(outline, count, mean_s, executable, out)
            efficiency, ramp_s = efficiency_of(workers)
            rows.append({"workers": count, "trial_s": mean_s, "efficiency": efficiency, "ramp_s": ramp_s})
            line = f"{count:>3} workers, trials of {mean_s:>4} s: efficiency {efficiency:.3f}"
            print(f"{line}, all busy after {ramp_s:.1f} s", flush=True)
    return rows


@contextlib.contextmanager
def ray_workers(place: Path) -> Iterator[Path]:
    """The program that starts Ray's workers with everything imported."""
    os.environ.update({"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"})
    preloaded = Preloaded(place, os.environ)
    try:
        yield preloaded.executable
    finally:
        preloaded.close()


def drive_on_ray(outline: StudyOutline, count: int, mean_s: float, executable: Path, out: Path) -> ObservedWorkers:
    settings = WorkersConfig(count=count, runtime_env={"py_executable": str(executable)})
    cache = CacheFolder(out.parent, "-", is_named=False)
    request = SleepingRequest(outline.config, None, None, 1, cache, f"desk-{out.name}", outline, mean_s)
    with connected(settings) as cluster:
        lanes = LaneBook(out.parent / "workers.json")
        workers = ObservedWorkers(cluster, cluster.share(), request, settings, lanes, SleepingWorker)
        workers.intervals = []
        workers.join_all(StudyListener())
        drive(workers, out)
        workers.close()
    return workers


def driver_times(sizes: list[int], sampler: str, place: Path) -> dict[str, Row]:
    """Milliseconds of the driver per trial, for studies of these sizes."""
    found = {}
    for size in sizes:
        out = place / f"size-{size}"
        drive(VirtualWorkers(outline_of(study(FIRST, sampler)), 8), out)
        multiply(out / "study.db", size)
        workers = VirtualWorkers(outline_of(study(size + MEASURED, sampler)), 8)
        drive(workers, out)
        steps = [1e3 * (after - before) for before, after in itertools.pairwise(workers.driver_s)]
        found[str(size)] = {"median_ms": statistics.median(steps), "mean_ms": statistics.mean(steps)}
        line = ", ".join(f"{name} {value:.1f}" for name, value in found[str(size)].items())
        print(f"{size:>6} finished trials: {line}", flush=True)
    return found


def multiply(path: Path, size: int) -> None:
    """Copy the finished trials of a study of `FIRST` ones until there are this many."""
    of_trials = ("trial_params", "trial_values", "trial_user_attributes", "trial_system_attributes")
    with contextlib.closing(sqlite3.connect(path)) as database, database:

        def copy(table: str, old: int, new: dict[str, int]) -> None:
            names = [row[1] for row in database.execute(f"pragma table_info({table})")]
            names = names if table == "trials" else names[1:]  # without the row's own id
            values = ", ".join(str(new.get(name, name)) for name in names)
            columns = ", ".join(names)
            database.execute(f"insert into {table} ({columns}) select {values} from {table} where trial_id = {old}")

        finished = database.execute(
            "select trial_id, number from trials where state = 'COMPLETE' and number > 0 order by number"
        ).fetchall()
        last, number = database.execute("select max(trial_id), count(*) from trials").fetchone()
        for (old, old_number), _ in zip(itertools.cycle(finished), range(size - FIRST), strict=False):
            last += 1
            copy("trials", old, {"trial_id": last, "number": number})
            for table in of_trials:
                copy(table, old, {"trial_id": last})
            database.execute(
                "update trial_user_attributes set value_json = replace(value_json, ?, ?)"
                " where trial_id = ? and key = 'record'",
                (f'\\"trial\\": {old_number},', f'\\"trial\\": {number},', last),
            )
            number += 1


def quality(seeds: int, place: Path) -> list[Row]:
    rows = []
    for count in (1, 8):
        found: dict[int, list[float]] = {evaluations: [] for evaluations in EVALUATIONS}
        for seed in range(seeds):
            outline = outline_of(study(1 + max(EVALUATIONS), "tpe", seed, "auto"))
            out = place / f"quality-{count}-{seed}"
            drive(VirtualWorkers(outline, count, topology=outline.topology), out)
            records = [record for record in open_study(out).records if record.state in EVALUATED_STATES]
            for evaluations, values in found.items():
                values.append(hypervolume(records[: evaluations + 1]))
        for evaluations, values in found.items():
            mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
            rows.append({"in_flight": count, "evaluations": evaluations, "hypervolume": mean, "error": error})
            print(f"{count} in flight, {evaluations} evaluations: {mean:.4f} +- {error:.4f}", flush=True)
    return rows


def hypervolume(records: list[TrialRecord]) -> float:
    """Dominated share of the box between (no accuracy, no reduction) and (the dense model's accuracy, 40 %)."""
    dense = records[0]
    values = [[-(record.value("accuracy") or 0.0), -record.cost["reduction"]] for record in records]
    return normalised_hypervolume(np.asarray(values), [0.0, 0.0], [-(dense.value("accuracy") or 0.0), -0.4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 8, 64])
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 5.0], help="mean durations of a trial")
    parser.add_argument("--ray", action="store_true", help="sleeping Ray actors instead of a virtual clock")
    parser.add_argument("--per-worker", type=int, default=8, help="trials per worker")
    parser.add_argument("--trials", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--seeds", type=int, default=0, help="studies in the comparison of quality; 0 leaves it out")
    parser.add_argument("--sampler", default="random")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dse-") as temporary:
        place = Path(temporary)
        document = {
            "sampler": options.sampler,
            "efficiency": efficiencies(options, place) if options.workers else [],
            "driver_ms_per_trial": driver_times(options.trials, options.sampler, place),
            "quality": quality(options.seeds, place) if options.seeds else [],
        }
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
