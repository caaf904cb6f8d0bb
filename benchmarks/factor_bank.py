"""The factor bank against decomposing in every trial, paired in one run, on the demo model.

    python benchmarks/factor_bank.py [--tokens 12288] [--points 5]

Prints the time to calibrate and build the bank, the time to reopen and verify it, and the peak memory. For random
points of search_spaces/layer_role_rank.yaml it prints the time to apply and undo them, from the bank and without one (a
truncated SVD of every tensor of the point, then the same surgery). Prints a table, then one JSON document as the last
line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dse import FactorBank, SearchSpace, TensorChoice, load_model
from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition import LowRankFactors, apply_point, calibration_windows, truncated_svd
from dse.models import LoadedModel


class WithoutBank:
    """A factor source without a bank: decomposes each tensor at the requested rank, every time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        module = self.loaded.model.get_submodule(self.loaded.topology[name].module)
        return truncated_svd(module.weight, choice.rank)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--points", type=int, default=5)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    space = SearchSpace.from_file(Path(__file__).parent.parent / "search_spaces/layer_role_rank.yaml", loaded.topology)
    config = CalibrationConfig(sources=[CalibrationSource(builtin="general")], tokens=arguments.tokens, window=256)
    windows = calibration_windows(loaded.tokenizer, config)
    loaded.fingerprint  # noqa: B018 - computed and cached here, so that the build time does not include it
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_s = seconds(lambda: FactorBank.build(loaded, space.largest_ranks(), windows, folder=folder))
        open_s = min(
            seconds(lambda: FactorBank.build(loaded, space.largest_ranks(), windows, folder=folder)) for _ in range(3)
        )
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        bank = FactorBank.build(loaded, space.largest_ranks(), windows, folder=folder)
        generator = random.Random(0)
        sources = {"bank": bank, "no_bank": WithoutBank(loaded)}
        times: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(arguments.points):
            levels = space.draw_feasible(generator)
            if levels is None:
                continue
            point = space.point(levels)
            for name, source in sources.items():
                times[name].append(
                    seconds(lambda: apply_point(loaded.model, loaded.topology, point, source).undo())  # noqa: B023
                )
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "calibration_tokens": arguments.tokens,
        "build_s": round(build_s, 1),
        "open_s": round(open_s, 2),
        "bank_bytes": size,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "apply_and_undo_bank_s": round(medians["bank"], 3),
        "apply_and_undo_no_bank_s": round(medians["no_bank"], 3),
        "ratio": round(medians["no_bank"] / medians["bank"], 1),
    }
    for name, value in result.items():
        print(f"{name:<28} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
