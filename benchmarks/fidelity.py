"""What the fidelity ladder saves, and what it costs the front: the same study with and without it.

    python benchmarks/fidelity.py --task arc_easy.yaml [--limit 250] [--trials 60] [--seeds 0 1 2] [--fresh 1000]

Same space, seed and number of trials, with the random sampler the very same trials, so that all difference is the
ladder's; accuracy and parameters are the objectives, so that nothing but evaluation takes time. No answer is shared
between the runs, each of which is a process of its own on one thread; two run side by side, so that both of a pair meet
the machine as it is then (`--processes`).
Evaluation time is the proxy's and the documents', in wall-clock and in CPU seconds; the latter are the robust ones on
a machine that others use. Front points of both runs have been evaluated on all documents, so their hypervolumes are
at full fidelity, against one reference. But a front is picked by what it scored on those documents, and the study
without a ladder picks from more of them: with `--fresh` both fronts, dense included, are measured again on documents
that neither study saw, which tells what they are worth. A table for people; one JSON document as the last line for
machines.
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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def study_of(options: argparse.Namespace, seed: int, fidelity: Any) -> dict[str, Any]:
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


def measured_again(study: dict[str, Any], fronts: dict[str, list[Any]], documents: int) -> dict[str, float]:
    """Hypervolume of each front on documents that no study saw; fronts are accuracy, parameters and point."""
    import dse
    from dse.config import parse_study
    from dse.decomposition import calibration_windows, longest_window
    from dse.evaluation import evaluator_for
    from dse.pareto import normalised_hypervolume, objectives_named, reference_point

    config = parse_study(study)
    loaded = dse.load_model(config.model.ref, dtype=config.model.dtype)
    evaluator = evaluator_for(loaded, config.tasks, config.evaluation, fresh=documents)
    found = {
        point.id: point for front in fronts.values() for *_, p in front for point in [_point(p, loaded)] if len(point)
    }
    windows = calibration_windows(loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model))
    bank = dse.FactorBank.build(loaded, found.values(), windows)
    dense = dse.DesignPoint.dense()
    accuracies = {dense.id: evaluator.evaluate().accuracy}
    for number, (identity, point) in enumerate(found.items(), 1):
        with dse.decompose(loaded, point, bank):
            accuracies[identity] = evaluator.evaluate().accuracy
        print(f"fresh documents: point {number} of {len(found)}", file=sys.stderr, flush=True)
    objectives = objectives_named(["accuracy", "parameters"])
    parameters = float(loaded.topology.parameters_dense)
    reference = reference_point(objectives, {"accuracy": accuracies[dense.id], "parameters": parameters})
    corner, ideal = [reference[o.name] for o in objectives], [o.ideal for o in objectives]
    return {
        name: normalised_hypervolume([[accuracies[_point(p, loaded).id], n] for _, n, p in front], corner, ideal)
        for name, front in fronts.items()
    }


def _point(content: Any, loaded: Any) -> Any:
    import dse

    return dse.DesignPoint.from_json(content, loaded.topology)


def in_a_process(request: dict[str, Any], kept: Path | None = None) -> dict[str, Any]:
    """The request's answer; a study's folder is `kept`, or gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if kept is None else kept
        command = [sys.executable, __file__, "--one", json.dumps({"out": str(out), **request})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def begun(pool: ThreadPoolExecutor, options: argparse.Namespace, seed: int) -> dict[str, Future[dict[str, Any]]]:
    """Both studies of a seed, the longer one first."""
    studies = {"without": study_of(options, seed, None), "with": study_of(options, seed, options.fidelity)}
    kept = {name: None if options.keep is None else options.keep / f"{seed}-{name}" for name in studies}
    return {name: pool.submit(in_a_process, {"study": study}, kept[name]) for name, study in studies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, help="an lm-eval task file, such as one of ARC-Easy")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=250, help="documents")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--sampler", default="random", help="one that learns goes another way after a stopped trial")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fresh", type=int, default=0, help="documents that both fronts are measured on at the end")
    parser.add_argument("--fidelity", type=json.loads, default='"auto"', help="as in a study file, as JSON")
    parser.add_argument("--keep", type=Path, help="where the studies' folders stay, for `fidelity_replay.py`")
    parser.add_argument("--processes", type=int, default=2, help="studies at a time, one thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        request = json.loads(options.one)
        if "fronts" in request:
            print(json.dumps(measured_again(request["study"], request["fronts"], request["documents"])))
        else:
            print(json.dumps(run(request["study"], Path(request["out"]))))
        return
    if options.task is None:
        parser.error("--task is needed")
    rows = []
    print(f"{options.trials} trials, {options.limit} documents of {options.task.name}, {options.sampler}")
    print(
        f"{'seed':>4} {'ladder':>7} {'CPU s':>8} {'wall s':>8} {'hypervolume':>12} {'front':>6}  trials by rung reached"
    )
    pool = ThreadPoolExecutor(options.processes)
    running = {seed: begun(pool, options, seed) for seed in options.seeds}
    for seed in options.seeds:
        pair = {name: future.result() for name, future in running[seed].items()}
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
        row = {"seed": seed, **pair, "ratio": speed, "hypervolume_change": change}
        if options.fresh:
            fronts = {name: found["front"] for name, found in pair.items()}
            study = study_of(options, seed, None)
            row["fresh"] = in_a_process({"study": study, "fronts": fronts, "documents": options.fresh})
            row["fresh_change"] = row["fresh"]["with"] / row["fresh"]["without"] - 1
            print(
                f"     on {options.fresh} fresh documents: hypervolume {100 * row['fresh_change']:+.2f} %", flush=True
            )
        for found in pair.values():
            found["front"] = [entry[:2] for entry in found["front"]]  # points are thousands of characters each
        rows.append(row)
    for key in ("hypervolume_change", "fresh_change") if len(rows) > 1 else ():
        changes = [100 * row[key] for row in rows if key in row]
        if changes:
            error = statistics.stdev(changes) / len(changes) ** 0.5
            print(f"{key}: {statistics.mean(changes):+.2f} ± {error:.2f} % over {len(changes)} seeds")
    print(
        json.dumps(
            {
                "trials": options.trials,
                "documents": options.limit,
                "fidelity": options.fidelity,
                "runs": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
