"""Cost of a sensitivity measurement: from stored hidden states, against full passes and the logits of both models.

    python benchmarks/sensitivity.py [--model demo:smollm2-135m-instruct] [--tokens 512] [--pairs 30] [--dtype float32]

Each pair measures the same point both ways, in alternating order. Points change one tensor each, spread over the
layers. The full pass is the measurement of the objective `kl_divergence`.

Prints one line per pair; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from dse.config import CalibrationConfig
from dse.decomposition import FactorBank, decompose, held_out_windows
from dse.design_point import DesignPoint, TensorChoice
from dse.evaluation.divergence import DenseDivergence
from dse.models import LoadedModel, load_model
from dse.sensitivity import DivergenceMeter


def points_over_layers(loaded: LoadedModel, count: int) -> list[tuple[int, DesignPoint]]:
    """Points that decompose the up projection of one layer each, with the layer, in order of depth."""
    last = loaded.topology.layer_count - 1
    points = []
    for layer in (round(i * last / max(1, count - 1)) for i in range(count)):
        tensors = [t for t in loaded.topology.tensors if t.layer == layer and t.role in ("up", "intermediate")]
        choice = TensorChoice("svd", min(tensors[-1].shape) // 4)
        points.append((layer, DesignPoint.of({tensors[-1].name: choice})))
    return points


def timed(measure: Callable[[], float]) -> tuple[float, float]:
    """Result and duration of a measurement."""
    start_s = time.perf_counter()
    result = measure()
    return result, time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    loaded = load_model(options.model, dtype=options.dtype)
    points = points_over_layers(loaded, options.pairs)
    bank = FactorBank.build(loaded, [point for _, point in points])
    windows = held_out_windows(loaded.tokenizer, CalibrationConfig(), options.tokens)
    start_s = time.perf_counter()
    meter = DivergenceMeter(loaded, windows, bank)
    set_up_s = time.perf_counter() - start_s
    whole = DenseDivergence(loaded.model, windows)
    stored_s, full_s, differences = [], [], []
    for index, (layer, point) in enumerate(points):

        def from_stored_states(point: DesignPoint = point, layer: int = layer) -> float:
            return meter.measure(point, layer).kl_divergence

        def full_pass(point: DesignPoint = point) -> float:
            with decompose(loaded, point, bank):
                return whole.measure().interval.value

        order = (from_stored_states, full_pass) if index % 2 == 0 else (full_pass, from_stored_states)
        found = {measure: timed(measure) for measure in order}
        (stored, stored_time), (full, full_time) = found[from_stored_states], found[full_pass]
        stored_s.append(stored_time)
        full_s.append(full_time)
        differences.append(abs(stored / full - 1))
        print(
            f"layer {layer:3d}  {full:.5f} nats  full pass {full_time:.2f} s"
            f"  from stored states {stored_time:.2f} s  ratio {full_time / stored_time:.2f}",
            flush=True,
        )
    document = {
        "benchmark": "sensitivity",
        "model": options.model,
        "tokens": windows.numel(),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "set_up_s": set_up_s,
        "full_pass_s": statistics.mean(full_s),
        "from_stored_states_s": statistics.mean(stored_s),
        "ratio_of_sums": sum(full_s) / sum(stored_s),
        "ratio_median": statistics.median(full / stored for full, stored in zip(full_s, stored_s, strict=True)),
        "largest_relative_difference": max(differences),
        "uses_stored_states": meter.uses_stored_states,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
