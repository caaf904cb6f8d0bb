"""Coverage of 95 % intervals of a mean: the BCa bootstrap of `dse`, the percentile bootstrap, and Student's t.

    python benchmarks/interval_coverage.py [--runs 1500]

Differences between two models are drawn from distributions with known means. Prints a table; the last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dse.evaluation.statistics import paired_bootstrap

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
RESAMPLES = 1000
KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda random, count: random.normal(0.3, 1.0, count), 0.3),
    "gamma, shape 0.3": (lambda random, count: random.gamma(0.3, 1.0, count), 0.3),
    "lognormal, sigma 1": (lambda random, count: random.lognormal(0.0, 1.0, count), math.exp(0.5)),
}


def covered(draw: Draw, truth: float, documents: int, runs: int) -> dict[str, float]:
    random, hits = np.random.default_rng(5), dict.fromkeys(("BCa", "percentile", "Student's t"), 0)
    for run in range(runs):
        values = draw(random, documents)
        found = paired_bootstrap([values], resamples=RESAMPLES, seed=run)
        hits["BCa"] += found.low is not None and found.high is not None and found.low <= truth <= found.high
        resampled = values[random.integers(0, documents, (RESAMPLES, documents))].mean(axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        hits["percentile"] += bool(low <= truth <= high)
        half = stats.t.ppf(0.975, documents - 1) * stats.sem(values)
        hits["Student's t"] += bool(abs(values.mean() - truth) <= half)
    return {name: count / runs for name, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1500)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| differences | documents | BCa | percentile | Student's t |\n|---|---|---|---|---|")
    for name, (draw, truth) in KINDS.items():
        for documents in (30, 100, 300):
            shares = covered(draw, truth, documents, options.runs)
            rows.append({"differences": name, "documents": documents, **shares})
            print(f"| {name} | {documents} | " + " | ".join(f"{share:.3f}" for share in shares.values()) + " |")
    print(json.dumps({"runs": options.runs, "coverage": rows}))


if __name__ == "__main__":
    main()
