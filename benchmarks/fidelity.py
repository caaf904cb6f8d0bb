"""What the fidelity ladder saves, and what it costs the front: the same study with and without it.

    python benchmarks/fidelity.py --task arc_easy.yaml [--limit 120] [--trials 60] [--seeds 0 1]

Same space, seed and number of trials; accuracy and parameters are the objectives, so that nothing but evaluation
takes time. No answer is shared between the runs, each of which is a process of its own on one thread, side by side.
Evaluation time is the proxy's and the documents', in wall-clock and in CPU seconds; the latter are the robust ones on
a machine that others use. Front points of both runs have been evaluated on all documents, so their hypervolumes are
at full fidelity, against one reference. A table for people; one JSON document as the last line for machines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def study_of(options: argparse.Namespace, seed: int, fidelity: Any) -> dict[str, Any]:
    return {
        "name": "fidelity",
        "model": options.model,
        "space": str(ROOT / "search_spaces" / "layer_role_rank.yaml"),
        "objectives": ["accuracy", "parameters"],
        "tasks": [{"task": str(options.task.resolve()), "limit": options.limit}],
        "evaluation": {"batch_size": 32, "seed": seed},
        "calibration": {"tokens": 12288, "window": 256},
        "fidelity": fidelity,
        "sampler": {"name": options.sampler, "seed": seed},
        "budget": {"trials": options.trials},
    }


def run(study: dict[str, Any], out: Path) -> dict[str, Any]:
    """One study in this process; its evaluation time and its front."""
    from dse.study import StudyListener, run_study

    class Clock(StudyListener):
        """CPU seconds from the start of each trial to its last word of progress: surgery, proxy and documents."""

        def __init__(self) -> None:
            self.cpu_s = self._begin_s = self._last_s = 0.0

        def on_trial_start(self, progress: Any, record: Any) -> None:
            self._begin_s = self._last_s = time.process_time()

        def on_phase(self, phase: str, done: int, total: int) -> None:
            self._last_s = time.process_time()

        def on_trial_end(self, progress: Any, record: Any) -> None:
            self.cpu_s += self._last_s - self._begin_s
            print(f"{record.trial} {record.state} rung {record.rung} {record.reason}", file=sys.stderr, flush=True)

    clock = Clock()
    finished = run_study(study, out=out, use_cache=False, listener=clock)
    records = finished.records
    evaluated = [r for r in records if r.state in ("complete", "stopped", "failed")]
    return {
        "wall_s": sum(r.seconds.get("evaluate", 0.0) + r.seconds.get("kl_divergence", 0.0) for r in evaluated),
        "cpu_s": clock.cpu_s,
        "hypervolume": finished.hypervolume,
        "front": [[r.quantities["accuracy"].value, r.cost["parameters"], r.point] for r in finished.front_records],
        "rungs": {
            str(rung): sum(r.rung == rung for r in evaluated) for rung in sorted({r.rung or 0 for r in evaluated})
        },
        "trials": len(evaluated),
    }


def in_a_process(study: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        request = {"study": study, "out": str(Path(folder) / "run")}
        command = [sys.executable, __file__, "--one", json.dumps(request)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, help="an lm-eval task file, such as one of ARC-Easy")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--limit", type=int, default=120, help="documents")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fidelity", type=json.loads, default='"auto"', help="as in a study file, as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        request = json.loads(options.one)
        print(json.dumps(run(request["study"], Path(request["out"]))))
        return
    if options.task is None:
        parser.error("--task is needed")
    rows = []
    print(f"{options.trials} trials, {options.limit} documents of {options.task.name}, {options.sampler}")
    print(
        f"{'seed':>4} {'ladder':>7} {'CPU s':>8} {'wall s':>8} {'hypervolume':>12} {'front':>6}  trials by rung reached"
    )
    for seed in options.seeds:
        studies = {"with": study_of(options, seed, options.fidelity), "without": study_of(options, seed, None)}
        with ThreadPoolExecutor() as both:  # side by side, so that both meet the machine as it is then
            pair = dict(zip(studies, both.map(in_a_process, studies.values()), strict=True))
        for name, found in pair.items():
            print(
                f"{seed:>4} {name:>7} {found['cpu_s']:>8.1f} {found['wall_s']:>8.1f} {found['hypervolume']:>12.4f}"
                f" {len(found['front']):>6}  {found['rungs']}",
                flush=True,
            )
        speed = {clock: pair["without"][clock] / pair["with"][clock] for clock in ("cpu_s", "wall_s")}
        change = pair["with"]["hypervolume"] / pair["without"]["hypervolume"] - 1
        print(
            f"     {speed['cpu_s']:.2f} x less evaluation in CPU seconds, {speed['wall_s']:.2f} x in wall-clock ones;"
            f" hypervolume {100 * change:+.2f} %",
            flush=True,
        )
        rows.append({"seed": seed, **pair, "ratio": speed, "hypervolume_change": change})
    print(
        json.dumps({"trials": options.trials, "documents": options.limit, "fidelity": options.fidelity, "runs": rows})
    )


if __name__ == "__main__":
    main()
