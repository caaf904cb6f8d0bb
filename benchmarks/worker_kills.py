"""Kill workers, nodes and the driver at random moments, and count what is lost.

    python benchmarks/worker_kills.py [--kills 100] [--trials 40] [--nodes 3] [--seed 0] [--out runs/worker_kills]

Studies of a tiny model run on a Ray cluster of several nodes on this machine, one after another, until enough processes
have been killed. Of the kills, nine tenths are SIGKILL of a worker, the others the removal of a node, or SIGKILL of the
driver, which is started again with another number of workers. No trial loses more than two workers, since a third one
would end it. After each study these must hold: every budgeted trial is there, no point was evaluated twice, no finished
record has changed, and points, accuracies and front are those of an undisturbed study.

Prints one line per study, then the kills by phase; the last line is one JSON document. Exits with 1 if anything is
lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from tiny_models import save_tiny_model
from tiny_study import environment, save_choice_task, write_study
from worker_support import Killer, outcome, worker_study

from dse.study import Study, open_study, run_study
from dse.trial_record import EVALUATED_STATES

_DRIVER_S = (20.0, 60.0)
_NODE_SHARE = 0.3


class Disturbance:
    """One study, disturbed until it is complete."""

    def __init__(self, cluster: Any, folder: Path, out: Path, trials: int, generator: random.Random) -> None:
        self._cluster, self._out, self._generator = cluster, out, generator
        self._study = write_study(folder / f"{out.name}.yaml", worker_study(folder, trials))
        self._environment = environment(folder)
        self.kills: Counter[str] = Counter()
        self.changed = 0

    def run(self, kills: int) -> Study:
        """Run the study to its end; kills at most this many processes."""
        known: dict[int, Any] = {}
        while True:
            workers = self._generator.randint(1, len(self._cluster.worker_nodes))
            killer = Killer(self._out, max(0, kills - self.kills.total()), self._generator.randrange(10**6), (0.2, 4.0))
            with killer.running():
                is_complete = self._drive(workers, may_kill=killer.kills > 0)
            self.kills.update(entry.phase or "idle" for entry in killer.log)
            found = {r.trial: r for r in open_study(self._out).records} if (self._out / "study.db").exists() else {}
            self.changed += sum(found.get(trial) != record for trial, record in known.items())
            known = found
            if is_complete:
                return open_study(self._out)

    def _drive(self, workers: int, *, may_kill: bool) -> bool:
        """Run the driver, or kill it or a node on the way; returns whether it ended by itself."""
        command = [sys.executable, "-m", "dse.cli", "run", str(self._study), "--out", str(self._out), "--no-cache"]
        command += ["--workers", str(workers), "--ray-address", self._cluster.address]
        process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            process.wait(self._generator.uniform(*_DRIVER_S) if may_kill else None)
        except subprocess.TimeoutExpired:
            if self._generator.random() < _NODE_SHARE:
                node = self._generator.choice(sorted(self._cluster.worker_nodes, key=id))
                self._cluster.remove_node(node, allow_graceful=False)
                self._cluster.add_node(num_cpus=1, num_gpus=1)
                self.kills["node"] += 1
                process.wait()
            else:
                process.kill()
                self.kills["driver"] += 1
        errors = process.communicate()[1]
        if process.returncode not in (0, -9):
            raise RuntimeError(f"dse run ended with {process.returncode}: {errors}")
        return process.returncode == 0


def lost(study: Study, undisturbed: Study) -> list[str]:
    """What does not hold."""
    points = [r.point_id for r in study.records if r.state in EVALUATED_STATES]
    broken = []
    if len(points) != undisturbed.evaluated_trials:
        broken.append(f"{len(points)} trials instead of {undisturbed.evaluated_trials}")
    if len(set(points)) != len(points):
        broken.append("a point was evaluated twice")
    if outcome(study) != outcome(undisturbed):
        broken.append("points, accuracies or front differ")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/worker_kills"))
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_tiny_model(folder / "model")
        save_choice_task(folder, documents=96)
    os.environ.update(environment(folder) | {"RAY_AUTH_MODE": "disabled"})
    begin_s, generator = time.monotonic(), random.Random(options.seed)
    undisturbed = run_study(worker_study(folder, options.trials), out=folder / f"undisturbed-{options.trials}")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    kills: Counter[str] = Counter()
    broken, changed, studies = [], 0, 0
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.shutdown)
        for _ in range(options.nodes):
            cluster.add_node(num_cpus=1, num_gpus=1)
        while kills.total() < options.kills:
            out = folder / f"disturbed-{options.seed}-{studies}-{os.getpid()}"
            disturbance = Disturbance(cluster, folder, out, options.trials, generator)
            study = disturbance.run(options.kills - kills.total())
            studies += 1
            kills.update(disturbance.kills)
            changed += disturbance.changed
            broken += lost(study, undisturbed)
            print(f"study {studies}: {disturbance.kills.total()} kills, {study.evaluated_trials} trials", flush=True)
    for phase, count in kills.most_common():
        print(f"{phase:<16}{count:>5}")
    document = {"kills": dict(kills), "studies": studies, "trials": options.trials, "changed_records": changed}
    wall_s = round(time.monotonic() - begin_s)
    print(json.dumps({**document, "total": kills.total(), "broken": broken, "wall_s": wall_s}))
    return 1 if broken or changed else 0


if __name__ == "__main__":
    sys.exit(main())
