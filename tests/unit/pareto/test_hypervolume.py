from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from optuna._hypervolume import compute_hypervolume

from dse.errors import ConfigError
from dse.pareto import GrowingHypervolume, hypervolume, normalised_hypervolume


def _minimise(columns: int) -> list[str]:
    return ["minimize"] * columns


def test_one_box() -> None:
    assert hypervolume([[1.0, 2.0, 3.0]], [4.0, 4.0, 5.0], _minimise(3)) == pytest.approx(3 * 2 * 2)


def test_overlap_of_two_boxes_is_counted_once() -> None:
    assert hypervolume([[1.0, 2.0], [2.0, 1.0]], [3.0, 3.0], _minimise(2)) == pytest.approx(2 + 2 - 1)
    assert hypervolume([[0, 0, 1], [0, 1, 0], [1, 0, 0]], [2, 2, 2], _minimise(3)) == pytest.approx(3 * 4 - 3 * 2 + 1)


def test_maximised_column_has_its_reference_below() -> None:
    assert hypervolume([[0.6, 2.0], [0.8, 5.0]], [0.0, 10.0], ["maximize", "minimize"]) == pytest.approx(
        0.6 * 8 + 0.2 * 5
    )


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5])
def test_simplex_lattice_dominates_the_cells_above_it(columns: int) -> None:
    # Of the unit cells of the cube [0, n]^k, the lattice points with coordinate sum n - 1 dominate exactly those whose
    # lower corner has a coordinate sum of at least n - 1.
    size = 4
    lattice = np.array([p for p in np.ndindex(*(size,) * columns) if sum(p) == size - 1], dtype=float)
    cells = sum(sum(cell) >= size - 1 for cell in np.ndindex(*(size,) * columns))
    assert hypervolume(lattice, [size] * columns, _minimise(columns)) == pytest.approx(cells)


@pytest.mark.parametrize("columns", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_optuna(columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    directions = np.abs(random.normal(size=(30, columns)))
    points = 1.0 - directions / np.linalg.norm(directions, axis=1, keepdims=True)  # a front
    points = np.concatenate([points, random.uniform(0.2, 1.3, size=(20, columns))])  # points that add little or nothing
    inside = points[(points < 1.1).all(axis=1)]
    expected = compute_hypervolume(inside, np.full(columns, 1.1))
    assert hypervolume(points, [1.1] * columns, _minimise(columns)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_agrees_with_monte_carlo(columns: int) -> None:
    random = np.random.default_rng(columns)
    points = random.uniform(0, 1, size=(12, columns))
    darts = random.uniform(0, 1, size=(200_000, columns))
    hit = np.zeros(len(darts), dtype=bool)
    for point in points:
        hit |= (darts >= point).all(axis=1)
    share = hit.mean()
    tolerance = 5 * math.sqrt(share * (1 - share) / len(darts))  # five standard errors
    assert abs(hypervolume(points, [1.0] * columns, _minimise(columns)) - share) < tolerance


POINTS = st.integers(1, 4).flatmap(
    lambda columns: hnp.arrays(
        np.float64, st.tuples(st.integers(1, 8), st.just(columns)), elements=st.floats(-0.5, 1.5, width=32)
    )
)


@given(POINTS)
@settings(max_examples=60)
def test_volume_is_monotonic_and_independent_of_order(points: np.ndarray) -> None:
    columns = points.shape[1]
    whole = normalised_hypervolume(points, [1.0] * columns, [0.0] * columns)
    assert 0.0 <= whole <= 1.0
    part = normalised_hypervolume(points[:-1], [1.0] * columns, [0.0] * columns)
    assert part <= whole + 1e-12
    assert normalised_hypervolume(points[::-1], [1.0] * columns, [0.0] * columns) == pytest.approx(whole, abs=1e-12)
    better = np.minimum(points, points[::-1])
    assert normalised_hypervolume(better, [1.0] * columns, [0.0] * columns) >= whole - 1e-12


@given(POINTS, st.floats(0.01, 1000), st.floats(-10, 10))
@settings(max_examples=40)
def test_normalised_volume_is_independent_of_units(points: np.ndarray, scale: float, shift: float) -> None:
    columns = points.shape[1]
    plain = normalised_hypervolume(points, [1.0] * columns, [0.0] * columns)
    # A negative scale also turns minimised columns into maximised ones.
    turned = normalised_hypervolume(-points * scale + shift, [-scale + shift] * columns, [shift] * columns)
    assert turned == pytest.approx(plain, abs=1e-6)


def test_points_outside_add_nothing_and_points_beyond_the_ideal_are_clipped() -> None:
    assert normalised_hypervolume([[0.5, 1.0], [2.0, 0.0], [np.nan, 0.0]], [1.0, 1.0], [0.0, 0.0]) == 0.0
    assert normalised_hypervolume([[-3.0, -3.0]], [1.0, 1.0], [0.0, 0.0]) == 1.0
    assert normalised_hypervolume([[-3.0, 0.5]], [1.0, 1.0], [0.0, 0.0]) == pytest.approx(0.5)
    assert normalised_hypervolume(np.empty((0, 2)), [1.0, 1.0], [0.0, 0.0]) == 0.0
    assert normalised_hypervolume([[np.inf, 0.5], [0.5, 0.5]], [1.0, 1.0], [0.0, 0.0]) == pytest.approx(0.25)


def test_invalid_boxes_are_refused() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        normalised_hypervolume([[0.5, 0.5]], [1.0, 0.0], [0.0, 0.0])
    with pytest.raises(ConfigError, match="finite numbers"):
        hypervolume([[0.5]], [math.nan], ["minimize"])
    with pytest.raises(ConfigError, match="shape"):
        normalised_hypervolume([[0.5]], [1.0, 1.0], [0.0, 0.0])
    with pytest.raises(ConfigError, match="infinitely better"):
        hypervolume([[-math.inf]], [1.0], ["minimize"])


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_a_growing_hypervolume_equals_the_volume_of_all_points(columns: int) -> None:
    random = np.random.default_rng(columns)
    values = random.uniform(-0.1, 1.2, size=(40, columns))
    values[5] = values[4]
    values[7, 0] = np.nan
    reference, ideal = [1.0] * columns, [0.0] * columns
    growing = GrowingHypervolume(reference, ideal)
    before = 0.0
    for count, row in enumerate(values, start=1):
        gained = growing.add(row)
        expected = normalised_hypervolume(values[:count], reference, ideal)
        assert growing.value == pytest.approx(expected, abs=1e-12)
        assert gained == pytest.approx(expected - before, abs=1e-12)
        before = expected


def test_a_growing_hypervolume_checks_its_corners() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        GrowingHypervolume([1.0, 1.0], [0.0, 1.0])
