"""Which search finds the best front: ours against the hand, the heuristics and plain Bayesian optimisation.

    python benchmarks/search.py --text wikitext2_valid.txt [--task arc_easy.yaml] [--out runs/search] [--evaluations 60]
        [--seeds 0 1 2] [--only paper tpe ours] [--processes 2] [--plot search.png]

Every contestant may evaluate the same number of points, each on the same windows of the text's middle third; what is
calibrated is so on the first third; and the front's points at 9 % and 20 % reduction are measured once more at the end,
on the last third, which no contestant saw, and on the questions of `--task`. What a contestant needs beside evaluations
(a sensitivity profile, ASVD's sensitivities) counts into its seconds.

Interrupt it at will: the same command goes on, and evaluations are shared by all contestants. With `--processes`
that many runs go side by side, on one thread each. A table for people, a plot if asked for; one JSON document as the
last line for machines.
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
from search_arena import Arena, Found, prepared
from search_contestants import CONTESTANTS

from dse.files import write_json
from dse.pareto import normalised_hypervolume

WORST_RATIO = 4.0  # of perplexity to dense: worse points count nothing, as do reductions above this:
LARGEST_REDUCTION = 0.4
REPORTED = (0.09, 0.20)
AT = (12, 24, 60)


@dataclass(frozen=True)
class Run:
    """What one contestant found with one seed, in the order of its evaluations."""

    contestant: str
    seed: int
    found: tuple[Found, ...]
    seconds: float

    def front(self, evaluations: int) -> list[Found]:
        """Points that no other of the first `evaluations` dominates, by reduction."""
        best, kept = math.inf, []
        for entry in sorted(self.found[:evaluations], key=lambda e: (-e.reduction, e.log_ratio)):
            if entry.log_ratio < best:
                best = entry.log_ratio
                kept.append(entry)
        return kept[::-1]

    def hypervolume(self, evaluations: int) -> float:
        """Share of the box from (4 x the dense perplexity, nothing removed) to (dense perplexity, 40 % removed)."""
        values = [[entry.log_ratio, entry.reduction] for entry in self.found[:evaluations]]
        corner, ideal = [math.log(WORST_RATIO), 0.0], [0.0, LARGEST_REDUCTION]
        return normalised_hypervolume(np.asarray(values).reshape(-1, 2), corner, ideal)

    def best_at(self, reduction: float, evaluations: int) -> Found | None:
        """The point of lowest perplexity, by the search's text, among those that remove at least this much."""
        enough = [entry for entry in self.found[:evaluations] if entry.reduction >= reduction - 5e-4]
        return min(enough, key=lambda entry: entry.log_ratio, default=None)


def run_of(arena: Arena, contestant: str, seed: int, evaluations: int) -> Run:
    """Run a contestant, or read what it found before."""
    kept = arena.folder / "runs" / f"{contestant}-{seed}-{evaluations}.json"
    if kept.exists():
        content = json.loads(kept.read_text("utf-8"))
        return Run(contestant, seed, tuple(Found(**entry) for entry in content["found"]), content["seconds"])
    begun_s = time.monotonic()
    found = CONTESTANTS[contestant].run(arena, seed, evaluations)
    run = Run(contestant, seed, tuple(found), time.monotonic() - begun_s)
    content = {"found": [vars(entry) for entry in run.found], "seconds": run.seconds}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, content)
    return run


def report_on(arena: Arena, run: Run, evaluations: int, *, with_accuracy: bool) -> dict[str, Any]:
    """The row of a run: hypervolumes as evaluations go by, and its best points on what nobody saw."""
    row: dict[str, Any] = {"contestant": run.contestant, "seed": run.seed, "seconds": round(run.seconds, 1)}
    row |= {f"hypervolume_{n}": round(run.hypervolume(n), 4) for n in AT if n <= evaluations}
    row["front"] = [[round(e.reduction, 4), round(math.exp(e.log_ratio), 4)] for e in run.front(evaluations)]
    for reduction in REPORTED:
        best = run.best_at(reduction, evaluations)
        if best is not None:
            row[f"at_{round(100 * reduction)}"] = {
                "reduction": round(best.reduction, 4),
                "searched_ratio": round(math.exp(best.log_ratio), 4),
                **arena.report(best, with_accuracy=with_accuracy),
            }
    return row


def run_side_by_side(options: argparse.Namespace) -> None:
    """Every run and its report in a process of its own, for this one to read.

    First seeds first, those that take longest before others: what seeds share is measured once and then in the cache.
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
    counts = [n for n in AT if n <= evaluations]
    head = "".join(f"{f'HV@{n}':>8}" for n in counts)
    columns = f"{'ppl ratio at 9 %':>17} {'at 20 %':>9}   {'accuracy':>9} {'':>9}  {'s':>6}"
    print(f"{'contestant':<18}{'seed':>5}{head}   {columns}")
    for row in rows:
        volumes = "".join(f"{row[f'hypervolume_{n}']:>8.4f}" for n in counts)
        at = [row.get(f"at_{round(100 * reduction)}", {}) for reduction in REPORTED]
        ratios = [f"{entry['report_ratio']:.3f}" if entry else "-" for entry in at]
        accuracies = [f"{entry['accuracy']:.3f}" if entry.get("accuracy") is not None else "-" for entry in at]
        print(
            f"{row['contestant']:<18}{row['seed']:>5}{volumes}   {ratios[0]:>17} {ratios[1]:>9}"
            f"   {accuracies[0]:>9} {accuracies[1]:>9}  {row['seconds']:>6.0f}",
            flush=True,
        )


def plot(runs: Sequence[Run], evaluations: int, path: Path) -> None:
    """Hypervolume by evaluations, and the fronts of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.6))
    for index, contestant in enumerate(dict.fromkeys(run.contestant for run in runs)):
        mine = [run for run in runs if run.contestant == contestant]
        colour, width = ("black", 2.6) if contestant == "ours" else (f"C{index % 10}", 1.2)
        counts = np.arange(1, evaluations + 1)
        curves = np.asarray([[run.hypervolume(n) for n in counts] for run in mine])
        style = "-" if index < 10 else "--"
        left.plot(counts, curves.mean(axis=0), style, color=colour, lw=width, label=CONTESTANTS[contestant].title)
        if len(mine) > 1:
            left.fill_between(counts, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.12, lw=0)
        front = mine[0].front(evaluations)
        right.plot(
            [100 * e.reduction for e in front],
            [math.exp(e.log_ratio) for e in front],
            style + "o",
            color=colour,
            lw=width,
            ms=3,
        )
    left.set(xlabel="evaluations", ylabel="hypervolume", title="mean over seeds, band from least to most")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="UTF-8 text: calibration, search and report, a third each"
    )
    parser.add_argument("--task", type=Path, help="an lm-eval task file, for the accuracy of what is reported")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("runs/search_benchmark"))
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--search-tokens", type=int, default=1024)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--report-tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--child", choices=("first", "later"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun_s = time.monotonic()
    if options.processes > 1:
        run_side_by_side(options)
    arena = prepared(options)
    runs, rows = [], []
    for contestant in options.only:
        for seed in options.seeds if CONTESTANTS[contestant].is_random else options.seeds[:1]:
            print(f"{contestant}, seed {seed}", file=sys.stderr, flush=True)
            run = run_of(arena, contestant, seed, options.evaluations)
            runs.append(run)
            # Questions take longer than all else that is reported: one run of each, and every one of ours.
            with_accuracy = contestant == "ours" or (seed == options.seeds[0] and options.child != "later")
            rows.append(report_on(arena, run, options.evaluations, with_accuracy=with_accuracy))
    print_table(rows, options.evaluations)
    if options.plot is not None and options.child is None:
        plot(runs, options.evaluations, options.plot)
    facts = {"evaluations": options.evaluations, "dtype": options.dtype, "wall_s": round(time.monotonic() - begun_s, 1)}
    print(json.dumps({**facts, **arena.facts, "rows": rows}))


if __name__ == "__main__":
    main()
