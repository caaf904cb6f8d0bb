"""What a divergence measurement costs: from stored states, against a whole pass and all logits of both models.

    python benchmarks/sensitivity.py [--model demo:smollm2-135m-instruct] [--tokens 512] [--pairs 30] [--dtype float32]

Each pair measures the same point both ways, one after the other, in alternating order; points change one tensor each,
spread over the layers. The naive way is what a study's objective `kl_divergence` does for a point: a whole pass, and
both distributions formed from kept hidden states. Prints one line a pair and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from dse.config import CalibrationConfig
from dse.decomposition import FactorBank, decompose, held_out_windows
from dse.design_point import DesignPoint, TensorChoice
from dse.evaluation.divergence import DenseDivergence
from dse.models import load_model
from dse.sensitivity import DivergenceMeter


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    loaded = load_model(options.model, dtype=options.dtype)
    layers = [round(i * (loaded.topology.layer_count - 1) / max(1, options.pairs - 1)) for i in range(options.pairs)]
    names = [
        next(t.name for t in reversed(loaded.topology.tensors) if t.layer == layer and t.role in ("up", "intermediate"))
        for layer in layers
    ]
    points = [DesignPoint.of({name: TensorChoice("svd", min(loaded.topology[name].shape) // 4)}) for name in names]
    bank = FactorBank.build(loaded, points)
    windows = held_out_windows(loaded.tokenizer, CalibrationConfig(), options.tokens)
    start = time.perf_counter()
    meter = DivergenceMeter(loaded, windows, bank)
    set_up_s = time.perf_counter() - start
    naive = DenseDivergence(loaded.model, windows)
    ratios, ours_s, naive_s, differences = [], [], [], []
    for index, (layer, point) in enumerate(zip(layers, points, strict=True)):

        def from_states(point: DesignPoint = point, layer: int = layer) -> float:
            return meter.measure(point, layer).kl_divergence

        def whole(point: DesignPoint = point) -> float:
            with decompose(loaded, point, bank):
                return naive.measure().interval.estimate

        ways = (from_states, whole) if index % 2 == 0 else (whole, from_states)
        took, found = {}, {}
        for way in ways:
            start = time.perf_counter()
            found[way] = way()
            took[way] = time.perf_counter() - start
        ours_s.append(took[from_states])
        naive_s.append(took[whole])
        ratios.append(took[whole] / took[from_states])
        differences.append(abs(found[from_states] / found[whole] - 1))
        print(
            f"layer {layer:3d}  {found[whole]:.5f} nats  whole pass {took[whole]:.2f} s"
            f"  from stored states {took[from_states]:.2f} s  ratio {ratios[-1]:.2f}",
            flush=True,
        )
    document = {
        "benchmark": "sensitivity",
        "model": options.model,
        "tokens": windows.numel(),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "set_up_s": set_up_s,
        "naive_s": sum(naive_s) / len(naive_s),
        "from_stored_states_s": sum(ours_s) / len(ours_s),
        "ratio_of_sums": sum(naive_s) / sum(ours_s),
        "ratio_median": statistics.median(ratios),
        "largest_relative_difference": max(differences),
        "uses_stored_states": meter.uses_stored_states,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
