"""Whether refitting the sensitivity table to measured points predicts later points better than the table alone.

    python benchmarks/refitted_divergence.py --study runs/search_benchmark/studies/ours-0 [...]
    python benchmarks/refitted_divergence.py --dtype bfloat16 --points 40

For finished studies on a depth-profile space, trials are taken in order. After every fifth trial the sensitivities are
refitted to the trials so far, and both models predict the next ten. This needs only a sensitivity profile, which is
cached if the study ran on this machine. Without a study, points of such a space (allocations under random profiles, and
random points) are drawn and measured first. The additive table is in nats of another text, so its predictions are
scaled by the median ratio over the points seen. Prints a table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import dse
from dse import FactorBank, load_model
from dse.config import CalibrationConfig, CalibrationSource, load_search_space
from dse.decomposition import calibration_windows, held_out_windows, longest_window
from dse.design_point import DesignPoint
from dse.errors import PointError
from dse.progress import ignore_progress
from dse.search.refitted_sensitivities import observed_divergence, refit_sensitivities
from dse.search.space_sensitivity import study_table
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.sensitivity import DivergenceMeter, ProfileSettings, measure_profile
from dse.sensitivity.sensitivity_table import SensitivityTable

ROOT = Path(__file__).resolve().parent.parent
AHEAD = 10

Sequenced = tuple[SensitivityTable, list[DesignPoint], list[float]]


def main() -> None:
    """Measure or read points, refit, compare, and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, nargs="+", default=[], help="folders of finished studies")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", default="whitened_svd")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the profile, and of the measured points")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sequences = {str(folder): of_study(folder) for folder in options.study} or {"drawn": of_drawn_points(options)}
    found = {name: [compared(*sequence, seen) for seen in counts(sequence)] for name, sequence in sequences.items()}
    for name, rows in found.items():
        print(name)
        for row in rows:
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    for key in ("rank_correlation", "log_error"):
        means = [
            np.mean([r[f"{who}_{key}"] for rows in found.values() for r in rows]) for who in ("additive", "refitted")
        ]
        print(f"mean {key}: additive {means[0]:.3f}, refitted {means[1]:.3f}")
    print(json.dumps(found))


def counts(sequence: Sequenced) -> range:
    """Numbers of points after which the next ones are predicted."""
    return range(5, len(sequence[1]) - AHEAD + 1, 5)


def of_study(folder: Path) -> Sequenced:
    """Sensitivity table, points and their observed divergence, in the order in which the study evaluated them."""
    study = dse.open_study(folder)
    config = study.config
    loaded = load_model(config.model.ref, dtype=config.model.dtype)
    space = SearchSpace.from_config(config.space, loaded.topology)
    windows = calibration_windows(loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model))
    bank = FactorBank.build(loaded, {}, windows)
    table = study_table(config, loaded, space, bank, windows, progress=ignore_progress, notify=print)
    if table is None:
        raise SystemExit(f"the study in {folder} has no sensitivity profile")
    complete = [record for record in study.records if record.state == "complete"]
    dense = next(record for record in complete if record.is_dense)
    points, divergences = [], []
    for record in complete:
        divergence = observed_divergence(record, dense)
        if not record.is_dense and divergence is not None and divergence > 0 and is_known(table, record.point):
            points.append(record.point)
            divergences.append(divergence)
    return table, points, divergences


def is_known(table: SensitivityTable, point: DesignPoint) -> bool:
    """Whether the table covers all options of the point, so that both models can predict it."""
    try:
        table.divergence_of(point)
    except PointError:
        return False
    return True


def of_drawn_points(options: argparse.Namespace) -> Sequenced:
    """Sensitivity table of a profile, drawn points, and their KL divergence."""
    loaded = load_model(options.model, dtype=options.dtype)
    calibration = CalibrationConfig(
        sources=[CalibrationSource(builtin="general")], tokens=8192, window=256, seed=options.seed
    )
    windows = calibration_windows(loaded.tokenizer, calibration)
    text = held_out_windows(loaded.tokenizer, calibration, 2 * options.tokens)
    half = len(text) // 2
    settings = ProfileSettings(methods=(options.method,))
    table = measure_profile(loaded, text[:half], windows, settings).table
    bank = FactorBank.build(loaded, settings.rank_requests(loaded.topology), windows)
    config = load_search_space(ROOT / "search_spaces" / "depth_profile.yaml")
    space = SearchSpace.from_config(config.model_copy(update={"methods": [options.method]}), loaded.topology)
    assert isinstance(space, DepthProfileSpace)  # noqa: S101 - by its kind
    points = drawn(space.with_table(table), options.points, random.Random(options.seed))
    meter = DivergenceMeter(loaded, text[half:], bank)
    measured = []
    for index, point in enumerate(points):
        measured.append(meter.measure(point).kl_divergence)
        print(f"{index + 1}/{len(points)}: {measured[-1]:.4f}, additive {table.divergence_of(point):.4f}", flush=True)
    return table, points, measured


def drawn(space: DepthProfileSpace, count: int, generator: random.Random) -> list[DesignPoint]:
    """Two thirds allocations under random profiles, one third random combinations of options, mixed."""
    points: list[DesignPoint] = []
    while len(points) < count:
        source = space.grid if generator.random() < 1 / 3 else space
        levels = source.draw_feasible(generator, 0.03, 0.3)
        if levels is not None and all(source.point(levels) != point for point in points):
            points.append(source.point(levels))
    return points


def compared(
    table: SensitivityTable, points: Sequence[DesignPoint], measured: Sequence[float], seen: int
) -> dict[str, float]:
    """Predictions of both models for the ten points after the first `seen`."""
    model = refit_sensitivities(table, points[:seen], measured[:seen])
    additive = np.array([max(table.divergence_of(point), 1e-9) for point in points[: seen + AHEAD]])
    factor = float(np.median(np.array(measured[:seen]) / additive[:seen]))
    real = np.array(measured[seen : seen + AHEAD])
    predictions = {
        "additive": factor * additive[seen:],
        "refitted": np.array([model.predict(point) for point in points[seen : seen + AHEAD]]),
    }
    row: dict[str, float] = {"seen": seen}
    for name, values in predictions.items():
        row[f"{name}_rank_correlation"] = round(float(spearmanr(values, real).statistic), 3)
        row[f"{name}_log_error"] = round(float(np.abs(np.log(np.maximum(values, 1e-9) / real)).mean()), 3)
    row["exponent"] = round(model.exponent, 3)
    return row


if __name__ == "__main__":
    main()
