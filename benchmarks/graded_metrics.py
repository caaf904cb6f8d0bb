"""Number of documents that separate two design points, by accuracy and by graded metrics.

    python benchmarks/graded_metrics.py TASK.yaml [--limit 240] [--model demo:smollm2-135m-instruct]

The dense model and some mild decompositions answer the same documents of a multiple-choice task. Reported for every
pair and metric: the paired difference; the number of documents at which its 95 % interval is expected to exclude zero,
n x (1.96 standard errors / difference)^2; and, as a check without a formula, the share of random sets of 60 documents
in which the test detects the difference at a 5 % level (exact McNemar for accuracy, paired bootstrap for the others).
Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from typing import Any

import numpy as np
import torch

from dse import DesignPoint, FactorBank, TensorChoice, decompose, load_model, point_cost
from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition import calibration_windows
from dse.evaluation import Evaluator, TaskResult, TaskSpec
from dse.evaluation.statistics import Outcomes, drop_with_test
from dse.topology import Topology

SUBSET, SUBSETS = 60, 200
ATTENTION = ("query", "key", "value", "attention_output")


def points_of(topology: Topology) -> dict[str, DesignPoint]:
    def attention_at(fraction: float) -> DesignPoint:
        tensors = [tensor for tensor in topology.tensors if tensor.role in ATTENTION]
        ranks = {t.name: math.floor(fraction * t.parameters / (t.out_features + t.in_features)) for t in tensors}
        return DesignPoint.of({name: TensorChoice("whitened_svd", rank) for name, rank in ranks.items()})

    return {"dense": DesignPoint.of({})} | {
        f"attention {100 * share:.0f} %": attention_at(share) for share in (0.8, 0.6, 0.5)
    }


def outcomes_of(task: TaskResult) -> dict[str, Outcomes]:
    return {"accuracy": task.outcomes, **task.graded}


def detected_share(before: Outcomes, after: Outcomes) -> float:
    """Share of random sets of documents in which the test detects a difference."""
    random = np.random.default_rng(0)
    detected = 0
    for _ in range(SUBSETS):
        chosen = random.choice(before.size, SUBSET, replace=False)
        p_value = drop_with_test([before[chosen]], [after[chosen]]).p_value
        detected += p_value is not None and p_value < 0.05
    return detected / SUBSETS


def compared(before: Outcomes, after: Outcomes) -> dict[str, Any]:
    test, difference = drop_with_test([before], [after]), before - after
    error = float(difference.std(ddof=1)) / math.sqrt(difference.size)
    needed = math.inf if test.value == 0 else difference.size * (1.96 * error / test.value) ** 2
    return {
        "drop": test.value,
        "p_value": test.p_value,
        "documents_needed": math.ceil(needed) if math.isfinite(needed) else None,
        "found_share": detected_share(before, after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a multiple-choice task: a YAML file or an lm-eval task name")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--limit", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    evaluator = Evaluator(loaded, [TaskSpec(options.task, limit=options.limit)], batch_size=32)
    points = points_of(loaded.topology)
    config = CalibrationConfig(sources=[CalibrationSource(builtin="general")], tokens=options.tokens, window=256)
    decomposed = [point for point in points.values() if not point.is_dense]
    bank = FactorBank.build(loaded, decomposed, calibration_windows(loaded.tokenizer, config))
    scored: dict[str, dict[str, Outcomes]] = {}
    for name, point in points.items():
        begin = time.perf_counter()
        with decompose(loaded, point, bank):
            scored[name] = outcomes_of(evaluator.evaluate().tasks[0])
        means = ", ".join(f"{metric} {outcomes.mean():.4f}" for metric, outcomes in scored[name].items())
        reduction = point_cost(loaded.topology, point).reduction
        print(f"{name}: reduction {reduction:.3f}, {means} ({time.perf_counter() - begin:.0f} s)", flush=True)
    pairs = []
    print("\n| pair | metric | drop | p | documents needed | detected with 60 |\n|---|---|---|---|---|---|")
    for first, second in itertools.combinations(points, 2):
        for metric in scored[first]:
            found = compared(scored[first][metric], scored[second][metric])
            pairs.append({"first": first, "second": second, "metric": metric, **found})
            needed = "-" if found["documents_needed"] is None else f"{found['documents_needed']:,}"
            print(
                f"| {first}, {second} | {metric} | {found['drop']:.3f} | {found['p_value']:.3g} | {needed}"
                f" | {found['found_share']:.0%} |"
            )
    medians = {
        metric: statistics.median(
            math.inf if pair["documents_needed"] is None else pair["documents_needed"]
            for pair in pairs
            if pair["metric"] == metric
        )
        for metric in scored["dense"]
    }
    print(
        f"\nmedian number of documents needed: {', '.join(f'{name} {count:,.0f}' for name, count in medians.items())}"
    )
    print(json.dumps({"model": options.model, "documents": options.limit, "pairs": pairs}))


if __name__ == "__main__":
    main()
