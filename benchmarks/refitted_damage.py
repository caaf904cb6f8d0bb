"""Does refitting the damage table to measured points tell later points better than the additive table alone?

Points of a depth-profile space (allocations under random profiles, and random ones) are measured one after the other.
After every fifth the damage model is refitted to those measured so far, and both models predict the ten that follow.

    python benchmarks/refitted_damage.py --dtype bfloat16 --points 40
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from dse import FactorBank, load_model
from dse.config import CalibrationConfig, CalibrationSource, load_search_space
from dse.decomposition import calibration_windows, held_out_windows
from dse.design_point import DesignPoint
from dse.sensitivity import DamageMeter, ProfileSettings, measure_profile
from dse.study import SearchSpace
from dse.study.search.damage_model import refit
from dse.study.space import DepthProfileSpace

ROOT = Path(__file__).resolve().parent.parent
AHEAD = 10


def main() -> None:
    """Measure, refit, compare; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", default="whitened_svd")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024, help="of the profile, and as many of the measured points")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    loaded = load_model(options.model, dtype=options.dtype)
    calibration = CalibrationConfig(
        sources=[CalibrationSource(builtin="general")], tokens=8192, window=256, seed=options.seed
    )
    windows = calibration_windows(loaded.tokenizer, calibration)
    text = held_out_windows(loaded.tokenizer, calibration, 2 * options.tokens)
    half = len(text) // 2
    settings = ProfileSettings(methods=(options.method,))
    table = measure_profile(loaded, text[:half], windows, settings).table
    print(f"profile of {len(table.units)} blocks, {time.perf_counter() - began:.0f} s", flush=True)
    bank = FactorBank.build(loaded, settings.rank_requests(loaded.topology), windows)
    config = load_search_space(ROOT / "search_spaces" / "depth_profile.yaml")
    space = SearchSpace.from_config(config.model_copy(update={"methods": [options.method]}), loaded.topology)
    assert isinstance(space, DepthProfileSpace)  # noqa: S101 - by its kind
    space = space.with_table(table)
    points = drawn(space, options.points, random.Random(options.seed))
    meter = DamageMeter(loaded, text[half:], bank)
    measured = []
    for index, point in enumerate(points):
        measured.append(meter.measure(point).kl_divergence)
        print(f"{index + 1}/{len(points)}: {measured[-1]:.4f}, additive {table.damage_of(point):.4f}", flush=True)
    rows = [compared(table, points, measured, seen) for seen in range(5, len(points) - AHEAD + 1, 5)]
    for row in rows:
        print(row)
    print(json.dumps({"model": options.model, "dtype": options.dtype, "method": options.method, "rows": rows}))


def drawn(space: DepthProfileSpace, count: int, generator: random.Random) -> list[DesignPoint]:
    """Two thirds allocations under random profiles, one third random combinations of options, mixed."""
    points: list[DesignPoint] = []
    while len(points) < count:
        source = space.grid if generator.random() < 1 / 3 else space
        levels = source.draw_feasible(generator, 0.03, 0.3)
        if levels is not None and all(source.point(levels) != point for point in points):
            points.append(source.point(levels))
    return points


def compared(table: object, points: list[DesignPoint], measured: list[float], seen: int) -> dict[str, float]:
    """Predictions of the ten points after the first `seen`, by either model."""
    model = refit(table, points[:seen], measured[:seen])  # type: ignore[arg-type]
    later, real = points[seen : seen + AHEAD], np.array(measured[seen : seen + AHEAD])
    row: dict[str, float] = {"seen": seen}
    predictions = {"additive": [table.damage_of(p) for p in later], "refitted": [model.predict(p) for p in later]}  # type: ignore[attr-defined]
    for name, values in predictions.items():
        row[f"{name}_rank_correlation"] = round(float(spearmanr(values, real).statistic), 3)
        row[f"{name}_log_error"] = round(float(np.abs(np.log(np.maximum(values, 1e-9) / real)).mean()), 3)
    row["exponent"] = round(model.exponent, 3)
    return row


if __name__ == "__main__":
    main()
