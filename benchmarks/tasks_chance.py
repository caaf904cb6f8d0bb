"""Score the built-in tasks with a model and a badly degraded version, to verify that they measure the model.

    python benchmarks/tasks_chance.py [--model demo:smollm2-135m-instruct]

The degraded version has every decomposable tensor replaced by its truncated SVD of rank 1. Embeddings, norms and head
are unchanged, so it still knows word frequencies; a task that it solves would measure wording only. Prints accuracy
over all documents and per phenomenon or category, and the seconds per task; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from dse import DesignPoint, FactorBank, decompose, load_model
from dse.evaluation import Evaluator, TaskSpec

TASKS_FOLDER = Path(__file__).parents[1] / "dse" / "data" / "tasks"
GROUP_KEYS = {"dse_grammar": "phenomenon", "dse_facts": "category"}


def score(evaluator: Evaluator) -> dict[str, Any]:
    """Accuracy, its standard error, accuracy per group, number of documents and seconds."""
    result = evaluator.evaluate()
    (task,) = result.tasks
    rows = [json.loads(line) for line in (TASKS_FOLDER / f"{task.task}.jsonl").read_text("utf-8").splitlines()]
    groups = collections.defaultdict(list)
    for index, outcome in zip(evaluator.documents[task.task], task.outcomes, strict=True):
        groups[rows[index][GROUP_KEYS[task.task]]].append(float(outcome))
    return {
        "accuracy": task.value,
        "accuracy_stderr": task.stderr,
        "documents": task.documents,
        "seconds": result.seconds,
        "groups": {group: statistics.fmean(values) for group, values in sorted(groups.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1, help="more threads than free cores are very slow")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    evaluators = {name: Evaluator(loaded, [TaskSpec(name)], batch_size=32) for name in GROUP_KEYS}
    results = {"dense": {name: score(evaluator) for name, evaluator in evaluators.items()}}
    degraded_point = DesignPoint.uniform(loaded.topology, "svd", 1)
    with tempfile.TemporaryDirectory() as folder:
        bank = FactorBank.build(loaded, [degraded_point], folder=Path(folder))
        with decompose(loaded, degraded_point, bank):
            results["degraded"] = {name: score(evaluator) for name, evaluator in evaluators.items()}
    for name in GROUP_KEYS:
        dense, degraded = results["dense"][name], results["degraded"][name]
        print(f"\n{name}: {dense['documents']} documents, dense {dense['seconds']:.1f} s")
        print(f"  {'':28}  dense  degraded")
        for group in dense["groups"]:
            print(f"  {group:28} {dense['groups'][group]:6.3f}  {degraded['groups'][group]:6.3f}")
        print(f"  {'all':28} {dense['accuracy']:6.3f}  {degraded['accuracy']:6.3f}")
    print(json.dumps({"model": options.model, **results}))


if __name__ == "__main__":
    main()
