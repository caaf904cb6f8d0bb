"""How fast matrices are multiplied: by torch, by oneDNN, and by the kernel of mode `fast`, with cold weights.

    python benchmarks/products.py
    python benchmarks/products.py --rows 1 8 --shapes 576x3072 1536x576

Each way takes some products by as many different weights, by turns with the others, so that a machine that is faster in
one minute than in the next favours none; medians. Shapes are in x out. GB/s of the weight where rows are few, GFLOP/s
where they are many. A table for people; one JSON document as the last line for machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dse.kernel import FEW_ROWS, ChainMatrix, KernelChains, kernel_name
from dse.runtime.onednn import has_onednn, linear_by_onednn

SHAPES = ["576x3072", "1536x576", "576x576", "576x256", "256x3072", "576x96", "96x576"]
PASS_S = 0.03


def ways(pool: Tensor, rows: int, size: tuple[int, int]) -> dict[str, Callable[[Sequence[int]], object]]:
    """What multiplies by the weights of these numbers, by name."""
    columns, out = size
    x = torch.randn(rows, columns)
    weights = pool[: pool.numel() // (columns * out) * columns * out].view(-1, out, columns)
    turned = weights.view(-1, columns, out)
    found: dict[str, Callable[[Sequence[int]], object]] = {
        "torch": lambda chosen: [functional.linear(x, weights[index]) for index in chosen],
        "columns": lambda chosen: [x @ turned[index] for index in chosen],
    }
    if has_onednn(pool.device, pool.dtype):
        found["oneDNN"] = lambda chosen: [linear_by_onednn(x, weights[index]) for index in chosen]
    if KernelChains.is_for(pool):
        found["kernel"] = lambda chosen: KernelChains.one_by_one(
            pool, [ChainMatrix(out, columns, index * columns * out) for index in chosen]
        )(x)
    return found


def by_turns(pool: Tensor, rows: int, size: tuple[int, int], turns: int) -> dict[str, float]:
    """Median seconds of one product, by way."""
    count = pool.numel() // (size[0] * size[1])
    begin = 0

    def seconds(way: Callable[[Sequence[int]], object], products: int) -> float:
        nonlocal begin
        chosen = [(begin + index) % count for index in range(products)]
        begin += products
        start = time.perf_counter()
        way(chosen)
        return (time.perf_counter() - start) / products

    known = ways(pool, rows, size)
    products = {}
    for name, way in known.items():
        seconds(way, 1)
        products[name] = max(2, min(count, round(PASS_S / seconds(way, 2))))
    times: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(turns):
        for name, way in known.items():
            times[name].append(seconds(way, products[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 256])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="in x out, for example 576x3072")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=512, help="of all weights: more than caches hold")
    options = parser.parse_args()
    pool = torch.randn(options.megabytes * 2**20 // 4)
    found = []
    with torch.inference_mode():
        for rows in options.rows:
            for shape in options.shapes:
                columns, out = map(int, shape.split("x"))
                times = by_turns(pool, rows, (columns, out), options.turns)
                few, amount = rows <= FEW_ROWS, columns * out * (4 if rows <= FEW_ROWS else 2 * rows)
                speeds = {name: round(amount / seconds / 1e9, 1) for name, seconds in times.items()}
                found.append({"rows": rows, "in": columns, "out": out, "unit": "GB/s" if few else "GFLOP/s", **speeds})
                line = "  ".join(f"{name} {speed:6.1f}" for name, speed in speeds.items())
                print(f"{rows:>4} x {columns:>4} x {out:>4}  {line}  {'GB/s' if few else 'GFLOP/s'}", flush=True)
    machine = {"threads": torch.get_num_threads(), "kernel": kernel_name(pool.device, pool.dtype)}
    print(json.dumps({**machine, "rows": found}))


if __name__ == "__main__":
    main()
