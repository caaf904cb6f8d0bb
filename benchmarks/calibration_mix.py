"""Compare builtin calibration texts: the same points, whitened on different mixes.

    python benchmarks/calibration_mix.py [--tokens 8192] [--limit 160] [--wikitext wikitext2_valid.txt]

For every mix a new factor bank is built, and the same design points are scored on the offline tasks and by perplexity
on text that no mix contains. Prints a table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from factorisation import perplexity

from dse import DesignPoint, FactorBank, TensorChoice, decompose, load_model, point_cost
from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition import calibration_windows
from dse.evaluation import Evaluator, TaskSpec
from dse.models import LoadedModel
from dse.topology import Topology

MIXES: dict[str, dict[str, float]] = {
    "general": {"general": 1},
    "tasks (grammar + facts)": {"grammar": 1, "facts": 1},
    "python docs": {"python_docs": 1},
    "general 1 : grammar 1 : facts 1": {"general": 1, "grammar": 1, "facts": 1},
    "general 2 : grammar 1 : facts 1": {"general": 2, "grammar": 1, "facts": 1},
}
ATTENTION = ("query", "key", "value", "attention_output")


def points_of(topology: Topology) -> dict[str, DesignPoint]:
    def at_ratio(parameter_ratio: float, roles: tuple[str, ...], layers: range) -> DesignPoint:
        tensors = [t for t in topology.tensors if t.role in roles and t.layer in layers]
        ranks = {t.name: math.floor(parameter_ratio * t.parameters / (t.out_features + t.in_features)) for t in tensors}
        return DesignPoint.of({name: TensorChoice("whitened_svd", rank) for name, rank in ranks.items()})

    everywhere = range(topology.layer_count)
    return {
        "uniform 88 %": at_ratio(0.88, topology.roles, everywhere),
        "attention halved": at_ratio(0.5, ATTENTION, everywhere),
    }


def text_windows(loaded: LoadedModel, text: str, tokens: int = 4096, window: int = 512) -> torch.Tensor:
    """Windows of the first tokens of a text, shape (windows, window)."""
    token_ids = torch.tensor(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])[:tokens]
    return token_ids[: len(token_ids) // window * window].reshape(-1, window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument(
        "--wikitext", type=Path, help="a local WikiText file, used for perplexity and as an additional mix"
    )
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    evaluator = Evaluator(
        loaded, [TaskSpec("dse_grammar"), TaskSpec("dse_facts")], limit=arguments.limit, batch_size=32
    )
    texts = {"held-out text": (Path(__file__).parent.parent / "dse/data/general_heldout.txt").read_text("utf-8")}
    mixes = dict(MIXES)
    if arguments.wikitext:
        content = arguments.wikitext.read_text("utf-8")
        texts["WikiText"] = content[len(content) * 2 // 3 :]
        mixes["WikiText (not available offline)"] = {"wikitext": 1}
    points = points_of(loaded.topology)
    rows = []

    def score(mix: str, point: str, reduction: float) -> None:
        result = evaluator.evaluate()
        row = {"mix": mix, "point": point, "reduction": round(reduction, 4)}
        row |= {task.task: round(task.value, 4) for task in result.tasks}
        row |= {name: round(perplexity(loaded, text_windows(loaded, text)), 2) for name, text in texts.items()}
        rows.append(row)
        print(
            "  ".join(f"{value!s:<34}" if key == "mix" else f"{value!s:<21}" for key, value in row.items()), flush=True
        )

    score("-", "dense", 0.0)
    print("  ".join(rows[0]))
    for mix, weights in mixes.items():
        start_s = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if "wikitext" in weights:
                head = Path(folder) / "wikitext.txt"
                head.write_text(content[: len(content) * 2 // 3], encoding="utf-8")
                sources = [CalibrationSource(file=str(head))]
            else:
                sources = [CalibrationSource(builtin=name, weight=weight) for name, weight in weights.items()]
            config = CalibrationConfig(sources=sources, tokens=arguments.tokens, window=arguments.window)
            windows = calibration_windows(loaded.tokenizer, config)
            bank = FactorBank.build(loaded, points.values(), windows, folder=Path(folder) / "bank")
            for name, point in points.items():
                with decompose(loaded, point, bank):
                    score(mix, name, point_cost(loaded.topology, point).reduction)
        print(f"    {mix}: {time.monotonic() - start_s:.0f} s", flush=True)
    print(json.dumps({"tokens": arguments.tokens, "limit": arguments.limit, "rows": rows}))


if __name__ == "__main__":
    main()
