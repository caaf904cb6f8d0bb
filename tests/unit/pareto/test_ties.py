"""Ties with the front on arrays."""

from __future__ import annotations

import numpy as np
import pytest

from dse.errors import ConfigError
from dse.pareto import advantage_within_noise, tied_rows

BOTH = ["minimize", "minimize"]


def test_row_is_tied_with_the_first_front_row_that_dominates_it() -> None:
    values = [[1.0, 4.0], [2.0, 3.0], [2.0, 5.0], [3.0, 3.0], [np.nan, 0.0]]
    assert tied_rows(values, BOTH, lambda better, worse: True).tolist() == [-1, -1, 0, 1, -1]
    assert tied_rows(values, BOTH, lambda better, worse: False).tolist() == [-1] * 5


def test_every_dominating_front_row_must_tie() -> None:
    values = [[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]
    asked: list[tuple[int, int]] = []

    def is_tie(better: int, worse: int) -> bool:
        asked.append((better, worse))
        return better == 0

    assert tied_rows(values, BOTH, is_tie).tolist() == [-1, -1, -1]
    assert asked == [(0, 2), (1, 2)]


def test_equal_rows_are_all_on_the_front() -> None:
    assert tied_rows([[1.0], [1.0]], ["maximize"], lambda better, worse: True).tolist() == [-1, -1]


@pytest.mark.parametrize(("worse", "is_noise"), [(1.13, True), (1.15, False), (0.5, True)])
def test_advantage_is_compared_with_the_facing_sides_of_both_intervals(worse: float, is_noise: bool) -> None:
    # Half-widths of 0.1 each: noise reaches sqrt(2) x 0.1. The far sides of the intervals do not matter.
    first, second = (1.0, -9.0, 1.1), (worse, worse - 0.1, 99.0)
    assert advantage_within_noise(first, second, "minimize") is is_noise
    mirrored = [tuple(-value for value in (middle, high, low)) for middle, low, high in (first, second)]
    assert advantage_within_noise(*mirrored, "maximize") is is_noise


def test_shape_mismatch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(n, 2\)"):
        tied_rows([[1.0]], BOTH, lambda better, worse: True)
