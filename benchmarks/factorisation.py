"""Perplexity ratio of every decomposition method at the same points, on text outside the calibration text.

    python benchmarks/factorisation.py --text wikitext2_valid.txt [--tokens 16384] [--draws 2] [--dtype bfloat16]

Every method decomposes the same tensors to the same ranks: a uniform parameter ratio that removes 9 and 20 % of the
model; every attention matrix at 55 %; the 20 % point with query/key/value and gate/up as stacks of equal size; ranks
allocated by expected divergence. The first two thirds of the text are for calibration (each draw uses other windows),
the last third is scored. Prints a table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dse import DesignPoint, FactorBank, TensorChoice, decompose, load_model, point_cost
from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition import CalibrationWindows, calibration_windows, expected_divergence
from dse.models import LoadedModel
from dse.sensitivity.allocation_curves import allocate_curves
from dse.topology import Topology

ATTENTION = ("query", "key", "value", "attention_output")
Curves = Mapping[str, NDArray[np.float64]]
METHODS = ("whitened_svd", "fisher_svd", "fisher_svd_refit")
WINDOW = 512


def points_of(topology: Topology, method: str, curves: Curves) -> dict[str, DesignPoint]:
    def at_ratio(parameter_ratio: float, roles: tuple[str, ...]) -> DesignPoint:
        matrices = [topology.matrix(name) for name in topology.select("all", list(roles))]
        ranks = {m.name: max(1, math.floor(parameter_ratio * m.parameters / sum(m.shape))) for m in matrices}
        return DesignPoint.of({name: TensorChoice(method, rank) for name, rank in ranks.items()})

    def uniform(reduction: float, roles: tuple[str, ...]) -> DesignPoint:
        inside = sum(tensor.parameters for tensor in topology.tensors if tensor.layer is not None)
        return at_ratio(1 - reduction * topology.parameters_dense / inside, roles)

    points = {
        "uniform 9 %": uniform(0.09, topology.roles),
        "uniform 20 %": uniform(0.20, topology.roles),
        "attention 55 %": at_ratio(0.55, ATTENTION),
    }
    if topology.stacks:
        points["stacks 20 %"] = uniform(0.20, ("query_key_value", "attention_output", "gate_up", "down"))
    for reduction in (0.09, 0.20):
        point = allocate_curves(topology, curves, reduction, method=method).point
        points[f"allocated {100 * reduction:.0f} %"] = point
    return points


@torch.inference_mode()
def perplexity(loaded: LoadedModel, token_ids: torch.Tensor) -> float:
    total = 0.0
    for row in token_ids[:, None]:
        logits = loaded.model(row).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
    return math.exp(total / (token_ids.numel() - len(token_ids)))


def windows_of(loaded: LoadedModel, file: Path, tokens: int, draw: int) -> CalibrationWindows:
    """Calibration windows of a text file."""
    config = CalibrationConfig(sources=[CalibrationSource(file=str(file))], tokens=tokens, window=WINDOW, seed=draw)
    return calibration_windows(loaded.tokenizer, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="a UTF-8 text file; WikiText-2 in the published figures"
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--tokens", type=int, default=16384, help="number of calibration tokens")
    parser.add_argument("--evaluation-tokens", type=int, default=20480)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    content = arguments.text.read_text("utf-8")
    cut = len(content) * 2 // 3
    found = loaded.tokenizer(content[cut:], add_special_tokens=False)["input_ids"]
    held_out = torch.tensor(found)[: arguments.evaluation_tokens // WINDOW * WINDOW].reshape(-1, WINDOW)
    dense = perplexity(loaded, held_out)
    print(f"dense: perplexity {dense:.2f} over {held_out.numel()} tokens", flush=True)
    rows = []
    for draw in range(arguments.draws):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "head.txt").write_text(content[:cut], encoding="utf-8")
            windows = windows_of(loaded, folder / "head.txt", arguments.tokens, draw)
            curves = expected_divergence(loaded, windows, folder=folder)
            for method in arguments.methods:
                points = points_of(loaded.topology, method, curves)
                start_s = time.perf_counter()
                bank = FactorBank.build(loaded, points.values(), windows, folder=folder)
                build_s = time.perf_counter() - start_s
                for name, point in points.items():
                    start_s = time.perf_counter()
                    with decompose(loaded, point, bank):
                        apply_s = time.perf_counter() - start_s
                        ratio = perplexity(loaded, held_out) / dense
                    row = {
                        "draw": draw,
                        "method": method,
                        "point": name,
                        "reduction": round(point_cost(loaded.topology, point).reduction, 4),
                        "perplexity_ratio": round(ratio, 3),
                        "build_s": round(build_s, 1),
                        "apply_s": round(apply_s, 2),
                    }
                    rows.append(row)
                    print("  ".join(f"{value!s:<17}" for value in row.values()), flush=True)
    fixed = {"tokens": arguments.tokens, "dtype": arguments.dtype, "evaluation_tokens": held_out.numel()}
    print(json.dumps({**fixed, "dense_perplexity": round(dense, 3), "rows": rows}))


if __name__ == "__main__":
    main()
