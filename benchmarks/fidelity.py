"""Evaluation time saved by multi-fidelity evaluation, and its effect on the front: a study with and without it.

    python benchmarks/fidelity.py --task arc_easy.yaml [--limit 250] [--trials 60] [--seeds 0 1 2] [--fresh 1000]

Both studies of a pair have the same space, seed and budget, and with the random sampler the same trials, so early
stopping causes all of the difference. The objectives are accuracy and parameters, so only evaluation takes time. Each
study runs in its own process on one thread without the evaluation cache; the two of a pair run side by side, so that
they share the load of the machine (`--processes`).

Reported are the wall-clock and CPU seconds of the proxy and the documents (CPU seconds are robust on a shared machine),
and the hypervolume of the fronts, whose points are evaluated on all documents in either study. The best of many noisy
evaluations is biased upwards, and more so without early stopping, where more trials compete. `--fresh` therefore
measures the points of both fronts, and the dense model, again on documents that neither study saw.

Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("without", "with")


def study_document(options: argparse.Namespace, seed: int, fidelity: Any) -> dict[str, Any]:
    return {
        "name": "fidelity",
        "model": {"ref": options.model, "dtype": options.dtype},
        "space": str(ROOT / "search_spaces" / "layer_role_rank.yaml"),
        "objectives": ["accuracy", "parameters"],
        "tasks": [{"task": str(options.task.resolve()), "limit": options.limit}],
        "evaluation": {"batch_size": 32, "seed": seed, "compare_float32": False},
        "calibration": {"tokens": 12288, "window": 256},
        "fidelity": fidelity,
        "sampler": {"name": options.sampler, "seed": seed},
        "budget": {"trials": options.trials},
    }


def run_one_study(document: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run a study in this process; returns its evaluation time and its front."""
    from dse.study import StudyListener, run_study

    class CpuClock(StudyListener):
        """CPU seconds from the start of each trial to its last progress report: surgery, proxy and documents."""

        def __init__(self) -> None:
            self.cpu_s = self._start_s = self._last_s = 0.0

        def on_trial_start(self, progress: Any, record: Any) -> None:
            self._start_s = self._last_s = time.process_time()

        def on_phase(self, phase: str, done: int, total: int) -> None:
            self._last_s = time.process_time()

        def on_trial_end(self, progress: Any, record: Any) -> None:
            self.cpu_s += self._last_s - self._start_s
            print(f"{record.trial} {record.state} rung {record.rung} {record.reason}", file=sys.stderr, flush=True)

    clock = CpuClock()
    study = run_study(document, out=out, use_cache=False, listener=clock)
    evaluated = [r for r in study.records if r.state in ("complete", "stopped", "failed")]
    rungs = [r.rung or 0 for r in evaluated]
    return {
        "wall_s": sum(r.seconds.get("evaluate", 0.0) + r.seconds.get("kl_divergence", 0.0) for r in evaluated),
        "cpu_s": clock.cpu_s,
        "hypervolume": study.hypervolume,
        "front": [[r.value("accuracy"), r.value("parameters"), r.point.to_json()] for r in study.front_records],
        "rungs": {str(rung): rungs.count(rung) for rung in sorted(set(rungs))},
        "trials": len(evaluated),
    }


def fresh_hypervolumes(
    document: dict[str, Any], fronts: Mapping[str, Sequence[Any]], documents: int
) -> dict[str, float]:
    """Hypervolume of each front on documents that no study saw.

    Args:
        document: The study, for its model, task and calibration text.
        fronts: Name to its points, each as accuracy, parameters and the point's JSON.
        documents: Number of documents per task.
    """
    import dse
    from dse.config import parse_study
    from dse.decomposition import longest_window
    from dse.evaluation import evaluator_for
    from dse.pareto import normalised_hypervolume, objectives_named, reference_point

    config = parse_study(document)
    loaded = dse.load_model(config.model.ref, dtype=config.model.dtype)
    evaluator = evaluator_for(loaded, config.tasks, config.evaluation, fresh=documents)
    sized = {
        name: [(dse.DesignPoint.from_json(point, loaded.topology), parameters) for _, parameters, point in front]
        for name, front in fronts.items()
    }
    dense = dse.DesignPoint.dense()
    points = {point.id: point for front in sized.values() for point, _ in front if not point.is_dense}
    windows = dse.calibration_windows(loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model))
    bank = dse.FactorBank.build(loaded, points.values(), windows)
    accuracies = {dense.id: evaluator.evaluate().accuracy}
    for number, (identity, point) in enumerate(points.items(), 1):
        with dse.decompose(loaded, point, bank):
            accuracies[identity] = evaluator.evaluate().accuracy
        print(f"fresh documents: point {number} of {len(points)}", file=sys.stderr, flush=True)
    objectives = objectives_named(["accuracy", "parameters"])
    parameters = float(loaded.topology.parameters_dense)
    reference = reference_point(objectives, {"accuracy": accuracies[dense.id], "parameters": parameters})
    corner, ideal = [reference[o.name] for o in objectives], [o.ideal for o in objectives]
    return {
        name: normalised_hypervolume([[accuracies[point.id], size] for point, size in front], corner, ideal)
        for name, front in sized.items()
    }


def in_subprocess(request: dict[str, Any], kept: Path | None = None) -> dict[str, Any]:
    """Run a request in a process of its own; the study's folder is `kept`, or removed afterwards if None."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if kept is None else kept
        command = [sys.executable, __file__, "--one", json.dumps({"out": str(out), **request})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Serve a request of `in_subprocess`."""
    if "fronts" in request:
        return fresh_hypervolumes(request["study"], request["fronts"], request["documents"])
    return run_one_study(request["study"], Path(request["out"]))


def start_pair(pool: ThreadPoolExecutor, options: argparse.Namespace, seed: int) -> dict[str, Future[dict[str, Any]]]:
    """Start both studies of a seed, the longer one first."""
    kept = {name: None if options.keep is None else options.keep / f"{seed}-{name}" for name in NAMES}
    return {
        name: pool.submit(in_subprocess, {"study": study_document(options, seed, fidelity)}, kept[name])
        for name, fidelity in zip(NAMES, (None, options.fidelity), strict=True)
    }


def compare_pair(options: argparse.Namespace, seed: int, pair: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print the lines of a seed; returns its part of the JSON document."""
    for name, study in pair.items():
        print(
            f"{seed:>4} {name:>14} {study['cpu_s']:>8.1f} {study['wall_s']:>8.1f} {study['hypervolume']:>12.4f}"
            f" {len(study['front']):>6}  {study['rungs']}",
            flush=True,
        )
    speed = {clock: pair["without"][clock] / pair["with"][clock] for clock in ("cpu_s", "wall_s")}
    change = pair["with"]["hypervolume"] / pair["without"]["hypervolume"] - 1
    print(
        f"     {speed['cpu_s']:.2f} x less evaluation in CPU seconds, {speed['wall_s']:.2f} x in wall-clock seconds;"
        f" hypervolume {100 * change:+.2f} %",
        flush=True,
    )
    row = {"seed": seed, **pair, "ratio": speed, "hypervolume_change": change}
    if options.fresh:
        fronts = {name: study["front"] for name, study in pair.items()}
        document = study_document(options, seed, None)
        row["fresh"] = in_subprocess({"study": document, "fronts": fronts, "documents": options.fresh})
        row["fresh_change"] = row["fresh"]["with"] / row["fresh"]["without"] - 1
        print(f"     on {options.fresh} fresh documents: hypervolume {100 * row['fresh_change']:+.2f} %", flush=True)
    for study in pair.values():
        study["front"] = [entry[:2] for entry in study["front"]]  # points take thousands of characters each
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, help="an lm-eval task file, such as one for ARC-Easy")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=250, help="number of documents")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument(
        "--sampler", default="random", help="a model-based sampler diverges after the first stopped trial"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--fresh", type=int, default=0, help="new documents per task, on which both fronts are measured"
    )
    parser.add_argument("--fidelity", type=json.loads, default='"auto"', help="the study file's section, as JSON")
    parser.add_argument("--keep", type=Path, help="folder that keeps the studies, for `fidelity_replay.py`")
    parser.add_argument("--processes", type=int, default=2, help="concurrent studies, one thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(answer(json.loads(options.one))))
        return
    if options.task is None:
        parser.error("--task is required")
    rows = []
    print(f"{options.trials} trials, {options.limit} documents of {options.task.name}, sampler {options.sampler}")
    heads = f"{'seed':>4} {'early stopping':>14} {'CPU s':>8} {'wall s':>8} {'hypervolume':>12} {'front':>6}"
    print(f"{heads}  trials by rung reached")
    pool = ThreadPoolExecutor(options.processes)
    running = {seed: start_pair(pool, options, seed) for seed in options.seeds}
    for seed in options.seeds:
        pair = {name: future.result() for name, future in running[seed].items()}
        rows.append(compare_pair(options, seed, pair))
    for key in ("hypervolume_change", "fresh_change") if len(rows) > 1 else ():
        changes = [100 * row[key] for row in rows if key in row]
        if changes:
            error = statistics.stdev(changes) / len(changes) ** 0.5
            print(f"{key}: {statistics.mean(changes):+.2f} ± {error:.2f} % over {len(changes)} seeds")
    settings = {"trials": options.trials, "documents": options.limit, "fidelity": options.fidelity}
    print(json.dumps({**settings, "runs": rows}))


if __name__ == "__main__":
    main()
