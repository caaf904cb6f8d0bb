"""The multiple of ranks that timings ask for, on scripted devices whose tiles are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.measurement.device_profile import rank_multiple
from dse.measurement.device_profile.model_profile import Phase
from dse.measurement.device_profile.product_timings import REFERENCE, ProductShape, ProductTimings
from dse.measurement.device_profile.rank_multiple import rank_multiple_shapes

SIZES = [(576, 576), (1536, 576), (576, 1536)]
PHASES = [Phase("prefill", 256, 1), Phase("decode", 1, 1)]


class Device(ProductTimings):
    """A device whose products take what a formula says."""

    formula: Callable[[ProductShape], float]

    def seconds(self, shape, layout):
        return self.formula(shape)


def device(folder: Path, formula: Callable[[ProductShape], float]) -> Device:
    made = Device(torch.device("cpu"), torch.float32, 2**20, folder)
    made.formula = formula
    return made


def up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


@pytest.mark.parametrize("tile", [2, 4, 8, 16, 32, 64])
def test_tiles_are_found(tile: int, tmp_path: Path) -> None:
    """A product pays for whole tiles, and the last part of one takes a slow path, as without vector instructions."""

    def seconds(shape: ProductShape) -> float:
        work = up(shape.out_features, tile) * up(shape.in_features, tile)
        ragged = shape.out_features % tile > 0 or shape.in_features % tile > 0
        return shape.rows * work * (1.2 if ragged else 1.0)

    assert rank_multiple(SIZES, PHASES, device(tmp_path, seconds)) == tile


def test_time_in_proportion_to_work_asks_for_nothing(tmp_path: Path) -> None:
    assert rank_multiple(SIZES, PHASES, device(tmp_path, lambda shape: float(shape.flops))) == 1


@given(noise=st.lists(st.floats(0.993, 1.007), min_size=14, max_size=14))
@settings(max_examples=50, deadline=None)
def test_noise_asks_for_nothing(noise: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of less than a hundredth."""

    def seconds(shape: ProductShape) -> float:
        return shape.flops * noise[(shape.out_features * 31 + shape.in_features) % len(noise)]

    assert rank_multiple(SIZES, PHASES, device(tmp_path_factory.mktemp("timings"), seconds)) == 1


def test_matrices_too_small_for_a_tile_ask_for_nothing_and_are_not_timed(tmp_path: Path) -> None:
    def refused(shape: ProductShape) -> float:
        raise AssertionError(shape)

    assert rank_multiple([(64, 64), (100, 40)], PHASES, device(tmp_path, refused)) == 1
    assert rank_multiple_shapes([(64, 64)], PHASES) == []


def test_all_that_is_compared_is_listed(tmp_path: Path) -> None:
    """Whoever times the list first has a progress bar; nothing is timed behind it but what all are timed beside."""
    listed, asked = rank_multiple_shapes(SIZES, PHASES), []

    def seconds(shape: ProductShape) -> float:
        asked.append(shape)
        return float(shape.flops)

    rank_multiple(SIZES, PHASES, device(tmp_path, seconds))
    assert {shape for shape in asked if (shape.out_features, shape.in_features) != REFERENCE} == set(listed)
    assert len(listed) == len(set(listed))
