"""What the driver costs: efficiency of many workers, and the driver's own time per trial as a study grows.

    python benchmarks/scale.py [--workers 1 2 8 64] [--seconds 5] [--trials 1000 10000] [--sampler random]

Workers sleep as long as a trial takes (Pareto-distributed around the mean, at most five times it) and return a damage
from a table instead of a measured accuracy. Driver, search and storage are the real ones. Efficiency is busy time /
(wall time x workers). The driver's time per trial leaves the waiting out; it is the median over the last 100 trials of
each size.

Prints two tables; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import heapq
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dse.config import StudyConfig, parse_study
from dse.evaluation.statistics.intervals import Interval
from dse.pareto import objectives_named
from dse.search.spaces.base import SearchSpace
from dse.standalone.model_request import ModelRequest
from dse.study.driver import StudyDriver
from dse.study.folder import StudyFolder
from dse.study.resume import resume_or_start
from dse.trial.measurement_plan import MeasurementPlan
from dse.workers.interface import FinishedJob, Workers
from dse.workers.jobs import EvaluateTrial, Job, TrialResult
from dse.workers.listener import Interrupts, StudyListener
from dse.workers.outline import StudyOutline


class SleepingWorkers(Workers):
    """Workers of no substance: a job is finished when its time is over; time passes only while the driver waits."""

    def __init__(self, outline: StudyOutline, count: int, seconds: float, seed: int = 0) -> None:
        self.outline, self.count = outline, count
        self.busy_s = self.waited_s = 0.0
        self.finished_s: list[float] = []
        self._mean_s, self._generator = seconds, random.Random(seed)
        self._running: list[tuple[float, int, Job]] = []
        self._waiting: list[Job] = []
        self._number = 0

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        self._start(time.perf_counter())

    def next_finished(self) -> FinishedJob:
        until_s, _, job = heapq.heappop(self._running)
        begin_s = time.perf_counter()
        if until_s > begin_s:
            time.sleep(until_s - begin_s)
        now_s = time.perf_counter()
        self.waited_s += now_s - begin_s
        self.finished_s.append(now_s - self.waited_s)  # the driver's own time so far
        self._start(max(until_s, begin_s) if self._mean_s else now_s)
        return FinishedJob(job, _result(job) if isinstance(job, EvaluateTrial) else None)

    def check_device(self) -> None:
        """Nothing to check."""

    def _start(self, now_s: float) -> None:
        while self._waiting and len(self._running) < self.count:
            lasts_s = self._mean_s * min(5.0, 0.6 * self._generator.paretovariate(2.5)) if self._mean_s else 0.0
            self._number += 1
            heapq.heappush(self._running, (now_s + lasts_s, self._number, self._waiting.pop(0)))
            self.busy_s += lasts_s


def _result(job: EvaluateTrial) -> TrialResult:
    """An accuracy that falls with the reduction, by an amount that depends on the point alone."""
    record = job.record
    noise = int(hashlib.sha256(record.point_id.encode()).hexdigest()[:8], 16) / 2**32
    accuracy = 0.7 - record.cost["reduction"] * (0.5 + noise)
    quantities = {"accuracy": Interval(accuracy, accuracy - 0.02, accuracy + 0.02)}
    return TrialResult(dataclasses.replace(record, state="complete", quantities=quantities), None)


def study(trials: int, sampler: str) -> StudyConfig:
    return parse_study(
        {
            "name": "scale",
            "model": "demo:smollm2-135m-instruct",
            "space": {"name":"t","methods":["svd"],"layers":list(range(0,30,5)),"roles":["query","up"],"ranks":{"kept_fractions":[0.2,0.4,0.6,0.8]}},
            "objectives": ["accuracy", "parameters"],
            "tasks": ["arc_easy"],
            "sampler": {"name": sampler, "seed": 0},
            "search": "off",
            "budget": {"trials": trials},
        }
    )


def outline_of(config: StudyConfig) -> StudyOutline:
    topology = ModelRequest(config.model.ref).topology()
    space = SearchSpace.from_config(config.constrained_space, topology)
    objectives = objectives_named([entry.name for entry in config.objectives])
    return StudyOutline(config, topology, space, objectives, MeasurementPlan.of(config, None), (), None, {}, False)


def drive(workers: SleepingWorkers, out: Path) -> float:
    """Run the study; returns its wall time."""
    folder = StudyFolder(out)
    out.mkdir(parents=True)
    folder.write_config(workers.outline.config)
    driver = StudyDriver(workers, folder, StudyListener(), Interrupts())
    begin_s = time.perf_counter()
    with driver.closing():
        driver.search_until_spent(resume_or_start(driver))
    return time.perf_counter() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 8, 64])
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 5.0], help="mean durations of a trial")
    parser.add_argument("--per-worker", type=int, default=8, help="trials per worker in the table of efficiencies")
    parser.add_argument("--trials", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--sampler", default="random")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in options.workers:
            for seconds in options.seconds:
                config = study(1 + max(8, options.per_worker * count), options.sampler)
                workers = SleepingWorkers(outline_of(config), count, seconds)
                wall_s = drive(workers, Path(temporary) / f"{count}-{seconds}")
                rows.append({"workers": count, "trial_s": seconds, "efficiency": workers.busy_s / (wall_s * count)})
                efficiency = rows[-1]["efficiency"]
                print(f"{count:>3} workers, trials of {seconds:>4} s: efficiency {efficiency:.3f}", flush=True)
        costs = {}
        if options.trials:
            config = study(max(options.trials), options.sampler)
            workers = SleepingWorkers(outline_of(config), 8, 0.0)
            drive(workers, Path(temporary) / "growing")
            moments = workers.finished_s
            for size in options.trials:
                last = [after - before for before, after in itertools.pairwise(moments[size - 101 : size])]
                costs[str(size)] = 1e3 * statistics.median(last)
                print(f"{size:>6} finished trials: {costs[str(size)]:.1f} ms of the driver per trial", flush=True)
    print(json.dumps({"sampler": options.sampler, "efficiency": rows, "driver_ms_per_trial": costs}))


if __name__ == "__main__":
    sys.exit(main())
