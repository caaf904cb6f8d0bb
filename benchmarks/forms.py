"""Perplexity of allocated points that mix low rank and MLP width, against low rank alone.

    python benchmarks/forms.py --text wikitext2_valid.txt [--test wikitext2_test.txt] [--other lambada.txt]
        [--draws 1] [--reductions 0.09 0.2 0.4] [--dtype float32]

Ranks and widths are allocated by their expected divergence, without a measurement; factors are refitted to the point.
The first two thirds of the text are for calibration (each draw uses other windows). Scored are the test text (the last
third of the text without one) and texts of other sources: the held-out text that this package ships, and `--other`.
Prints a table of perplexity ratios to the dense model, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from calibration_mix import text_windows
from factorisation import perplexity, windows_of
from numpy.typing import NDArray

from dse import DesignPoint, FactorBank, decompose, load_model, point_cost
from dse.decomposition import expected_divergence
from dse.design_point import PIVOTED
from dse.sensitivity import allocate, allocate_curves, expected_table
from dse.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
REFIT = "fisher_svd_refit"
Curves = Mapping[str, NDArray[np.float64]]


def low_rank(topology: Topology, curves: Curves, reduction: float) -> DesignPoint:
    """Ranks of every tensor."""
    tensors = {name: curve for name, curve in curves.items() if name in topology.by_name}
    return allocate_curves(topology, tensors, reduction, method=REFIT).point


def rank_and_width(topology: Topology, curves: Curves, reduction: float) -> DesignPoint:
    """Ranks or a width, whichever is expected to cost less in each block.

    Removal is left out: its expected divergence is that of a large change, which second-order estimates do not cover.
    """
    return allocate(expected_table(topology, curves, method=REFIT), reduction=reduction).point


def widths_only(topology: Topology, curves: Curves, reduction: float) -> DesignPoint:
    """Widths of every MLP; attention stays dense."""
    mlps = {name: curve for name, curve in curves.items() if name in topology.mlps_by_name}
    inside = {tensor for name in mlps for tensor in topology.tensors_of(name)}
    table = expected_table(topology, {**mlps, **{name: curves[name] for name in inside}}, method=REFIT)
    units = (
        dataclasses.replace(unit, options=tuple(o for o in unit.options if o.is_dense or o.narrows_mlp))
        for unit in table.units
    )
    return allocate(dataclasses.replace(table, units=tuple(units)), reduction=reduction).point


def pivoted(topology: Topology, curves: Curves, reduction: float) -> DesignPoint:
    """Ranks of every tensor, stored as pivoted factors."""
    tensors = {name: curve for name, curve in curves.items() if name in topology.by_name}
    return allocate_curves(topology, tensors, reduction, method=REFIT, form=PIVOTED).point


def pivoted_and_width(topology: Topology, curves: Curves, reduction: float) -> DesignPoint:
    """As `rank_and_width`, with pivoted factors."""
    return allocate(expected_table(topology, curves, method=REFIT, form=PIVOTED), reduction=reduction).point


CONTESTANTS = {
    "low rank": low_rank,
    "rank and width": rank_and_width,
    "width alone": widths_only,
    "pivoted": pivoted,
    "pivoted and width": pivoted_and_width,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text; WikiText-2 in the published figures")
    parser.add_argument("--test", type=Path, help="a text to score; default: the last third of --text")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="texts of other sources")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--tokens", type=int, default=12288, help="number of calibration tokens")
    parser.add_argument("--evaluation-tokens", type=int, default=20480)
    parser.add_argument("--other-tokens", type=int, default=4096, help="tokens of each other text")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.09, 0.2, 0.4])
    parser.add_argument("--contestants", nargs="+", default=["low rank", "rank and width"], choices=CONTESTANTS)
    parser.add_argument("--draws", type=int, default=1)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    content = arguments.text.read_text("utf-8")
    cut = len(content) * 2 // 3
    test = content[cut:] if arguments.test is None else arguments.test.read_text("utf-8")
    texts = {"test": text_windows(loaded, test, arguments.evaluation_tokens, WINDOW)}
    for file in (ROOT / "dse" / "data" / "general_heldout.txt", *arguments.other):
        texts[file.stem] = text_windows(loaded, file.read_text("utf-8"), arguments.other_tokens, WINDOW)
    dense = {name: perplexity(loaded, token_ids) for name, token_ids in texts.items()}
    print("dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()), flush=True)
    rows = []
    for draw in range(arguments.draws):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "head.txt").write_text(content[:cut], encoding="utf-8")
            windows = windows_of(loaded, folder / "head.txt", arguments.tokens, draw)
            start_s = time.perf_counter()
            curves = expected_divergence(loaded, windows, with_widths=True, folder=folder)
            curves_s = time.perf_counter() - start_s
            points = {
                (name, reduction): CONTESTANTS[name](loaded.topology, curves, reduction)
                for reduction in arguments.reductions
                for name in arguments.contestants
            }
            start_s = time.perf_counter()
            bank = FactorBank.build(loaded, points.values(), windows, folder=folder)
            print(f"curves {curves_s:.0f} s, bank {time.perf_counter() - start_s:.0f} s", flush=True)
            for (name, reduction), point in points.items():
                row: dict[str, object] = {
                    "draw": draw,
                    "forms": name,
                    "wanted": reduction,
                    "reduction": round(point_cost(loaded.topology, point).reduction, 4),
                    "point": composition(point),
                }
                with decompose(loaded, point, bank):
                    row |= {key: round(perplexity(loaded, ids) / dense[key], 3) for key, ids in texts.items()}
                rows.append(row)
                print("  ".join(f"{value!s:<10}" for value in row.values()), flush=True)
    fixed = {"tokens": arguments.tokens, "dtype": arguments.dtype}
    print(json.dumps({**fixed, "dense": {key: round(value, 3) for key, value in dense.items()}, "rows": rows}))


def composition(point: DesignPoint) -> str:
    """Numbers of decomposed tensors, narrow MLPs and removed blocks."""
    return f"{len(point.decomposed)} low rank, {len(point.widths)} width, {len(point.removed)} removed"


if __name__ == "__main__":
    main()
