"""Speed of `SharedPrefixLM` relative to lm-eval's `HFLM` at its best batch size, on the same requests.

    python benchmarks/scoring.py --task dse_grammar --task dse_facts --task path/to/arc_easy.yaml --limit 200

Both score the same lm-eval requests, including tokenisation, in alternation; a ratio is the median over the pairs. The
best batch size of `HFLM` is determined first, on a quarter of the documents. `utilisation` is the operation rate of the
unique tokens as a share of the machine's matrix-multiply rate, measured in the same run on the shapes of the model. The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from dse.evaluation import Evaluator, SharedPrefixLM, TaskSpec
from dse.evaluation.lm_eval.logging_control import quiet_lm_eval
from dse.evaluation.lm_eval.task_loading import build_leaves
from dse.evaluation.scoring import Query, pack
from dse.evaluation.task_spec import resolve_task
from dse.models import LoadedModel, load_model

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument(
        "--task", action="append", help="lm-eval task or YAML file; repeatable (dse_grammar, dse_facts)"
    )
    parser.add_argument("--limit", type=int, default=100, help="documents per task (100)")
    parser.add_argument("--pairs", type=int, default=3, help="alternations (3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="also score in bfloat16 and report the changes")
    options = parser.parse_args()
    loaded = load_model(options.model, device=options.device)
    tasks = options.task or ["dse_grammar", "dse_facts"]
    rows = [compare(loaded, task, options.limit, options.pairs) for task in tasks]
    print(f"{'task':<24}{'HFLM':>9}{'batch':>7}{'ours':>9}{'ratio':>8}{'pairs':>16}{'max diff':>10}{'utilisation':>13}")
    for row in rows:
        spread = f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}"
        print(
            f"{row['task']:<24}{row['hflm_s']:>8.2f}s{row['hflm_batch_size']:>7}{row['ours_s']:>8.2f}s"
            f"{row['ratio']:>7.2f}x{spread:>16}{row['largest_difference']:>10.1e}{row['utilisation']:>12.0%}"
        )
    document: dict[str, Any] = {"benchmark": "scoring", "threads": torch.get_num_threads(), "tasks": rows}
    if options.bfloat16:
        document["bfloat16"] = half_precision(options, tasks)
    print(json.dumps(document))


def compare(loaded: LoadedModel, task: str, limit: int, pairs: int) -> dict[str, Any]:
    spec = TaskSpec(task, limit=limit)
    source = resolve_task(spec)
    leaves = build_leaves(spec, source, limit=limit, seed=0, chat_template=None)
    requests = [instance for leaf in leaves for instance in leaf.task.instances]
    with quiet_lm_eval():
        settings: dict[str, Any] = {"tokenizer": loaded.tokenizer, "softmax_dtype": "float32"}
        theirs, ours = HFLM(loaded.model, **settings), SharedPrefixLM(loaded.model, **settings)
        kind = requests[0].request_type
        sample = requests[: max(8, len(requests) // 4)]
        ours_call, theirs_call = getattr(ours, kind), getattr(theirs, kind)
        ours_call(sample[:8], disable_tqdm=True)  # chooses the strategy for this architecture
        best = min(BATCH_SIZES, key=lambda size: seconds(lambda: with_batch(theirs, size, theirs_call, sample))[0])
        timed: list[tuple[float, float]] = []
        for pair in range(pairs):
            if pair % 2:
                ours_s, found = seconds(lambda: ours_call(requests, disable_tqdm=True))
                theirs_s, expected = seconds(lambda: with_batch(theirs, best, theirs_call, requests))
            else:
                theirs_s, expected = seconds(lambda: with_batch(theirs, best, theirs_call, requests))
                ours_s, found = seconds(lambda: ours_call(requests, disable_tqdm=True))
            timed.append((theirs_s, ours_s))
    values = [(a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in zip(found, expected, strict=True)]
    operations = unique_operations(loaded.model, ours, requests) if kind == "loglikelihood" else float("nan")
    ours_s = statistics.median(ours for _, ours in timed)
    rate = multiply_rate(loaded.model)
    return {
        "task": source.name,
        "requests": len(requests),
        "hflm_batch_size": best,
        "hflm_s": statistics.median(theirs for theirs, _ in timed),
        "ours_s": ours_s,
        "ratio": statistics.median(theirs / ours for theirs, ours in timed),
        "ratios": [theirs / ours for theirs, ours in timed],
        "largest_difference": max(abs(a - b) for a, b in values),
        "multiply_rate_flops": rate,
        "utilisation": operations / ours_s / rate,
    }


def with_batch(lm: HFLM, size: int, call: Callable[..., Any], requests: Sequence[Any]) -> Any:
    lm.batch_size_per_gpu = size
    return call(requests, disable_tqdm=True)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def unique_operations(model: PreTrainedModel, lm: SharedPrefixLM, requests: Sequence[Any]) -> float:
    """Operations of the unique tokens: two per entry of every matrix, with the head only at predicting positions."""
    queries = []
    for request in requests:
        context, scored = request.args
        before, after = lm._encode_pair(context, scored) if context else ([lm.prefix_token_id], lm.tok_encode(scored))
        queries.append(Query((*before, *after), len(after)))
    trees = pack(queries, pair_cost=0.0, most_nodes=10**9, least_saved=float("-inf"))
    nodes = sum(map(len, trees))
    states = sum(len({node for _, asked in tree.queries for node in asked}) for tree in trees)
    embedding = model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() > 1) - embedding
    return 2.0 * (nodes * matrices + states * model.get_output_embeddings().weight.numel())


def multiply_rate(model: PreTrainedModel, tokens: int = 768) -> float:
    """Highest rate at which this machine multiplies by the model's own matrices, operations per second."""
    shapes = {tuple(p.shape) for n, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in n}
    best = 0.0
    for shape in shapes:
        weight, states = torch.randn(shape), torch.randn(tokens, shape[1])
        for _ in range(12):
            taken, _ = seconds(lambda w=weight, x=states: torch.nn.functional.linear(x, w))
            best = max(best, 2.0 * tokens * weight.numel() / taken)
    return best


def half_precision(options: argparse.Namespace, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Time and metrics of the same tasks in float32 and bfloat16."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(options.model, dtype=dtype, device=options.device)
        evaluator = Evaluator(loaded, [TaskSpec(task, limit=options.limit) for task in tasks])
        evaluator.evaluate()
        found[dtype] = evaluator.evaluate()
    full, half = found["float32"], found["bfloat16"]
    print(f"float32 {full.seconds:.2f} s, bfloat16 {half.seconds:.2f} s: x{full.seconds / half.seconds:.2f}")
    rows = []
    for before, after in zip(full.tasks, half.tasks, strict=True):
        changed = int((before.outcomes != after.outcomes).sum())
        print(f"  {before.task} {before.metric}: {before.value:.4f} -> {after.value:.4f} ({changed} documents changed)")
        rows.append({"task": before.task, "metric": before.metric, "float32": before.value, "bfloat16": after.value})
        rows[-1] |= {"documents_changed": changed, "documents": before.documents}
    rows.append({"float32_s": full.seconds, "bfloat16_s": half.seconds})
    return rows


if __name__ == "__main__":
    main()
