"""Score the shipped tasks with a model and with its wreck, to see that they measure the model and not the wording.

    python benchmarks/tasks_chance.py path/to/folder-or-file.gguf

The wreck has every linear weight of the decoder replaced by its truncated SVD of rank 1; embeddings, norms and head are
kept, so it still knows how frequent words are. Prints accuracy over all documents and per phenomenon or category, the
seconds each task took, and one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS_FOLDER = Path(__file__).parents[1] / "dse" / "data" / "tasks"
GROUP_KEYS = {"dse_grammar": "phenomenon", "dse_facts": "category"}


def load(reference: Path, threads: int) -> tuple[Any, Any]:
    """Load model (float32, CPU) and tokenizer from a folder or a .gguf file."""
    torch.set_num_threads(threads)
    folder, options = (reference.parent, {"gguf_file": reference.name}) if reference.is_file() else (reference, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model, tokenizer


@torch.no_grad()
def wreck(model: Any) -> None:
    """Replace every linear weight outside the head by its best rank-1 approximation, in place."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            left, singular, right = torch.linalg.svd(module.weight, full_matrices=False)
            module.weight.copy_(singular[0] * torch.outer(left[:, 0], right[0]))


def read_task(name: str) -> Any:
    """Read a task file, its relative data files resolved against the file itself."""
    config = yaml.safe_load((TASKS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(TASKS_FOLDER / file) for split, file in files.items()}
    return config


def score(lm: HFLM, manager: TaskManager, name: str) -> dict[str, Any]:
    """Return accuracy, its standard error, accuracy per group, number of documents and seconds."""
    start_s = time.perf_counter()
    result = simple_evaluate(lm, tasks=[read_task(name)], task_manager=manager, log_samples=True, verbosity="ERROR")
    seconds = time.perf_counter() - start_s
    groups = collections.defaultdict(list)
    for sample in result["samples"][name]:
        groups[sample["doc"][GROUP_KEYS[name]]].append(sample["acc"])
    scores = [value for values in groups.values() for value in values]
    return {
        "accuracy": statistics.fmean(scores),
        "accuracy_stderr": result["results"][name]["acc_stderr,none"],
        "documents": len(scores),
        "seconds": seconds,
        "groups": {group: statistics.fmean(values) for group, values in sorted(groups.items())},
        "samples": result["samples"][name],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model, or a .gguf file")
    parser.add_argument("--tasks", nargs="+", default=list(GROUP_KEYS), choices=list(GROUP_KEYS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show-wrong", action="store_true", help="also list what the dense model got wrong")
    options = parser.parse_args()

    model, tokenizer = load(options.model, options.threads)
    manager = TaskManager(include_defaults=False)
    results: dict[str, dict[str, Any]] = {}
    for state in ("dense", "wrecked"):
        if state == "wrecked":
            wreck(model)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32, device="cpu")
        results[state] = {name: score(lm, manager, name) for name in options.tasks}

    for name in options.tasks:
        dense, wrecked = results["dense"][name], results["wrecked"][name]
        print(f"\n{name}: {dense['documents']} documents, dense {dense['seconds']:.1f} s")
        print(f"  {'':28}  dense  wrecked")
        for group in dense["groups"]:
            print(f"  {group:28} {dense['groups'][group]:6.3f}  {wrecked['groups'][group]:6.3f}")
        print(f"  {'all':28} {dense['accuracy']:6.3f}  {wrecked['accuracy']:6.3f}")
        if options.show_wrong:
            for sample in dense["samples"]:
                if not sample["acc"]:
                    scores = [round(float(score), 1) for score, _ in sample["filtered_resps"]]
                    print("   wrong:", {key: value for key, value in sample["doc"].items() if key != "bad"}, scores)
    for by_task in results.values():
        for result in by_task.values():
            del result["samples"]
    print(json.dumps({"model": str(options.model), **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
