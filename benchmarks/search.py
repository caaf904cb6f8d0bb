"""Which search finds the best front: dse's own against hand-picked points, heuristics and plain samplers.

    python benchmarks/search.py --text wikitext2_valid.txt [--task arc_easy.yaml] [--out runs/search] [--evaluations 60]
        [--seeds 0 1 2] [--only paper tpe ours] [--processes 2] [--plot search.png]

Every contestant evaluates the same number of points. The text is cut in thirds: calibration uses the first, and each
point is evaluated on the same windows of the second. The points of the front at 9 % and 20 % reduction are measured
again at the end on the last third, which no contestant saw, and on the questions of `--task`. Whatever else a
contestant measures (a sensitivity profile, ASVD's sensitivities) counts towards its seconds.

It can be interrupted: the same command resumes it. Contestants share the evaluations of equal points. With
`--processes`, several runs execute at a time, on one thread each.

Prints a table, and writes a plot on request; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from search_arena import Arena, EvaluatedPoint
from search_contestants import CONTESTANTS

from dse.files import write_json
from dse.pareto import normalised_hypervolume

WORST_RATIO = 4.0
"""Reference point of the hypervolume: perplexity relative to dense; worse points do not count."""
LARGEST_REDUCTION = 0.4
"""Ideal of the hypervolume; a larger reduction adds nothing."""
REPORTED_REDUCTIONS = (0.09, 0.20)
CHECKPOINTS = (12, 24, 60)
"""Numbers of evaluations after which the hypervolume is reported."""


@dataclass(frozen=True)
class Run:
    """The points of one contestant with one seed, in the order of evaluation."""

    contestant: str
    seed: int
    points: tuple[EvaluatedPoint, ...]
    seconds: float

    def front(self, evaluations: int) -> list[EvaluatedPoint]:
        """Non-dominated points among the first evaluations, in order of reduction."""
        best, kept = math.inf, []
        for point in sorted(self.points[:evaluations], key=lambda p: (-p.reduction, p.log_ratio)):
            if point.log_ratio < best:
                best = point.log_ratio
                kept.append(point)
        return kept[::-1]

    def hypervolume(self, evaluations: int) -> float:
        """Dominated share of the box between (4 x dense perplexity, no reduction) and (dense perplexity, 40 %)."""
        values = [[point.log_ratio, point.reduction] for point in self.points[:evaluations]]
        corner, ideal = [math.log(WORST_RATIO), 0.0], [0.0, LARGEST_REDUCTION]
        return normalised_hypervolume(np.asarray(values).reshape(-1, 2), corner, ideal)

    def best_at(self, reduction: float, evaluations: int) -> EvaluatedPoint | None:
        """The point of lowest perplexity on the search text with at least this reduction."""
        enough = [point for point in self.points[:evaluations] if point.reduction >= reduction - 5e-4]
        return min(enough, key=lambda point: point.log_ratio, default=None)


def run_contestant(arena: Arena, contestant: str, seed: int, evaluations: int) -> Run:
    """Run a contestant, or read its stored run."""
    path = arena.folder / "runs" / f"{contestant}-{seed}-{evaluations}.json"
    if path.exists():
        content = json.loads(path.read_text("utf-8"))
        points = tuple(EvaluatedPoint(**entry) for entry in content["found"])
        return Run(contestant, seed, points, content["seconds"])
    start_s = time.monotonic()
    found = CONTESTANTS[contestant].run(arena, seed, evaluations)
    run = Run(contestant, seed, tuple(found), time.monotonic() - start_s)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"found": [vars(point) for point in run.points], "seconds": run.seconds})
    return run


def report_row(arena: Arena, run: Run, evaluations: int, *, with_accuracy: bool) -> dict[str, Any]:
    """The row of a run: hypervolume at the checkpoints, and its best points on unseen text and questions."""
    row: dict[str, Any] = {"contestant": run.contestant, "seed": run.seed, "seconds": round(run.seconds, 1)}
    row |= {f"hypervolume_{n}": round(run.hypervolume(n), 4) for n in CHECKPOINTS if n <= evaluations}
    row["front"] = [[round(p.reduction, 4), round(math.exp(p.log_ratio), 4)] for p in run.front(evaluations)]
    for reduction in REPORTED_REDUCTIONS:
        best = run.best_at(reduction, evaluations)
        if best is not None:
            row[f"at_{round(100 * reduction)}"] = {
                "reduction": round(best.reduction, 4),
                "searched_ratio": round(math.exp(best.log_ratio), 4),
                **arena.report(best, with_accuracy=with_accuracy),
            }
    return row


def run_in_processes(options: argparse.Namespace) -> None:
    """Execute every run and its report in a process of its own; this process reads the stored results afterwards.

    The first seed comes first, and the slowest contestants before others: evaluations that seeds share are then in the
    cache for the other seeds.
    """
    todo = [
        (contestant, seed)
        for index, seed in enumerate(options.seeds)
        for contestant in reversed(options.only)
        if index == 0 or CONTESTANTS[contestant].is_random
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run_one(contestant: str, seed: int) -> None:
        command = [sys.executable, *sys.argv, "--processes", "1", "--only", contestant, "--seeds", str(seed)]
        command += ["--child", "first" if seed == options.seeds[0] else "later"]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)

    with ThreadPoolExecutor(options.processes) as pool:
        for future in [pool.submit(run_one, *entry) for entry in todo]:
            future.result()


def print_table(rows: Sequence[dict[str, Any]], evaluations: int) -> None:
    counts = [n for n in CHECKPOINTS if n <= evaluations]
    heads = "".join(f"{f'HV@{n}':>8}" for n in counts)
    columns = f"{'ppl ratio at 9 %':>17} {'at 20 %':>9}   {'accuracy':>9} {'':>9}  {'s':>6}"
    print(f"{'contestant':<18}{'seed':>5}{heads}   {columns}")
    for row in rows:
        volumes = "".join(f"{row[f'hypervolume_{n}']:>8.4f}" for n in counts)
        at = [row.get(f"at_{round(100 * reduction)}", {}) for reduction in REPORTED_REDUCTIONS]
        ratios = [f"{entry['report_ratio']:.3f}" if entry else "-" for entry in at]
        accuracies = [f"{entry['accuracy']:.3f}" if entry.get("accuracy") is not None else "-" for entry in at]
        print(
            f"{row['contestant']:<18}{row['seed']:>5}{volumes}   {ratios[0]:>17} {ratios[1]:>9}"
            f"   {accuracies[0]:>9} {accuracies[1]:>9}  {row['seconds']:>6.0f}",
            flush=True,
        )


def plot(runs: Sequence[Run], evaluations: int, path: Path) -> None:
    """Hypervolume over evaluations, and the fronts of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.6))
    counts = np.arange(1, evaluations + 1)
    for index, contestant in enumerate(dict.fromkeys(run.contestant for run in runs)):
        own = [run for run in runs if run.contestant == contestant]
        colour, width = ("black", 2.6) if contestant == "ours" else (f"C{index % 10}", 1.2)
        style = "-" if index < 10 else "--"
        curves = np.asarray([[run.hypervolume(n) for n in counts] for run in own])
        left.plot(counts, curves.mean(axis=0), style, color=colour, lw=width, label=CONTESTANTS[contestant].title)
        if len(own) > 1:
            left.fill_between(counts, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.12, lw=0)
        front = own[0].front(evaluations)
        reductions = [100 * point.reduction for point in front]
        ratios = [math.exp(point.log_ratio) for point in front]
        right.plot(reductions, ratios, style + "o", color=colour, lw=width, ms=3)
    left.set(xlabel="evaluations", ylabel="hypervolume", title="mean over seeds, band from minimum to maximum")
    right.set(
        xlabel="reduction, %",
        ylabel="perplexity / dense",
        yscale="log",
        ylim=(0.98, WORST_RATIO),
        xlim=(0, 40),
        title=f"fronts after {evaluations} evaluations, first seed",
    )
    right.set_yticks([1, 1.2, 1.5, 2, 3, 4], ["1", "1.2", "1.5", "2", "3", "4"])
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="UTF-8 text: a third each for calibration, search and report"
    )
    parser.add_argument("--task", type=Path, help="an lm-eval task file, for the accuracy of the reported points")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("runs/search_benchmark"))
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--search-tokens", type=int, default=1024)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=300, help="documents of --task per reported point")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="concurrent runs, one thread each")
    parser.add_argument("--child", choices=("first", "later"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    start_s = time.monotonic()
    if options.processes > 1:
        run_in_processes(options)
    arena = Arena(options)
    runs, rows = [], []
    for contestant in options.only:
        for seed in options.seeds if CONTESTANTS[contestant].is_random else options.seeds[:1]:
            print(f"{contestant}, seed {seed}", file=sys.stderr, flush=True)
            run = run_contestant(arena, contestant, seed, options.evaluations)
            runs.append(run)
            # Questions are the slowest part of the report: only one run per contestant has them, and all of ours.
            with_accuracy = contestant == "ours" or (seed == options.seeds[0] and options.child != "later")
            rows.append(report_row(arena, run, options.evaluations, with_accuracy=with_accuracy))
    print_table(rows, options.evaluations)
    if options.plot is not None and options.child is None:
        plot(runs, options.evaluations, options.plot)
    wall_s = round(time.monotonic() - start_s, 1)
    settings = {"evaluations": options.evaluations, "dtype": options.dtype, "wall_s": wall_s}
    print(json.dumps({**settings, **arena.facts, "rows": rows}))


if __name__ == "__main__":
    main()
