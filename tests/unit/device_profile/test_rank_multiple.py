"""The rank multiple derived from timings, on scripted devices with known tile sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.measurement.device_profile import (
    Phase,
    ProductShape,
    ProductTimings,
    find_rank_multiple,
    rank_multiple_shapes,
)

SIZES = [(576, 576), (1536, 576), (576, 1536)]
PHASES = [Phase("prefill", 256, 1), Phase("decode", 1, 1)]


class Device(ProductTimings):
    """A device whose timings follow a formula."""

    formula: Callable[[ProductShape], float]

    def seconds(self, shape: ProductShape) -> float:
        return self.formula(shape)


def device(folder: Path, formula: Callable[[ProductShape], float]) -> Device:
    made = Device(torch.device("cpu"), torch.float32, 2**20, folder)
    made.formula = formula
    return made


def up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


@pytest.mark.parametrize("tile", [2, 4, 8, 16, 32, 64])
def test_tiles_are_found(tile: int, tmp_path: Path) -> None:
    """A product pays for whole tiles, and a partial tile takes a slow path, as without vector instructions."""

    def seconds(shape: ProductShape) -> float:
        work = up(shape.out_features, tile) * up(shape.in_features, tile)
        ragged = shape.out_features % tile > 0 or shape.in_features % tile > 0
        return shape.rows * work * (1.2 if ragged else 1.0)

    assert find_rank_multiple(SIZES, PHASES, device(tmp_path, seconds)) == tile


def test_time_proportional_to_work_gives_no_multiple(tmp_path: Path) -> None:
    assert find_rank_multiple(SIZES, PHASES, device(tmp_path, lambda shape: float(shape.flops))) == 1


@given(noise=st.lists(st.floats(0.993, 1.007), min_size=14, max_size=14))
@settings(max_examples=50, deadline=None)
def test_noise_gives_no_multiple(noise: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Noise of less than one per cent."""

    def seconds(shape: ProductShape) -> float:
        return shape.flops * noise[(shape.out_features * 31 + shape.in_features) % len(noise)]

    assert find_rank_multiple(SIZES, PHASES, device(tmp_path_factory.mktemp("timings"), seconds)) == 1


def test_matrices_smaller_than_a_tile_give_no_multiple_and_are_not_timed(tmp_path: Path) -> None:
    def refused(shape: ProductShape) -> float:
        raise AssertionError(shape)

    assert find_rank_multiple([(64, 64), (100, 40)], PHASES, device(tmp_path, refused)) == 1
    assert rank_multiple_shapes([(64, 64)], PHASES) == []


def test_every_compared_product_is_listed(tmp_path: Path) -> None:
    """Callers time the listed products first, with a progress bar; nothing else may be timed afterwards."""
    listed, asked = rank_multiple_shapes(SIZES, PHASES), []

    def seconds(shape: ProductShape) -> float:
        asked.append(shape)
        return float(shape.flops)

    find_rank_multiple(SIZES, PHASES, device(tmp_path, seconds))
    assert set(asked) == set(listed)
    assert len(listed) == len(set(listed))
