from __future__ import annotations

import numpy as np
import pytest

from dse.pareto import knee_distances, knee_index

BOTH = ["minimize", "minimize"]


def test_knee_of_a_quarter_circle_is_its_middle() -> None:
    angles = np.linspace(0, np.pi / 2, 91)
    arc = np.column_stack([1 - np.cos(angles), 1 - np.sin(angles)])
    distances = knee_distances(arc, BOTH)
    assert knee_index(arc, BOTH) == 45
    # The centre (1, 1) is 1/sqrt 2 from the line x + y = 1, and the arc is 1 from the centre.
    assert distances[45] == pytest.approx(1 - 1 / np.sqrt(2))
    assert distances[[0, -1]] == pytest.approx([0, 0], abs=1e-12)


def test_knee_is_independent_of_units_and_directions() -> None:
    plain = np.array([[0, 10], [1, 4], [2, 3], [6, 1], [10, 0]], dtype=float)
    turned = np.column_stack([1 - plain[:, 0] / 50, plain[:, 1] * 1e6 + 3])
    assert (
        knee_index(plain, BOTH) == knee_index(turned, ["maximize", "minimize"]) == 1
    )  # 1 + 4 = 2 + 3: first objective


def test_dominated_and_unmeasured_points_are_ignored() -> None:
    values = np.array([[0, 10], [3, 3], [10, 0], [0.5, 30], [3, 3.1], [np.nan, 0], [-np.inf, np.inf]])
    distances = knee_distances(values, BOTH)
    assert np.isnan(distances).tolist() == [False, False, False, True, True, True, True]
    assert knee_index(values, BOTH) == 1


def test_three_objectives_use_the_plane_through_the_extremes() -> None:
    extremes = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    values = np.array([*extremes, [0.5, 0.5, 0.6], [0.3, 0.7, 0.8]], dtype=float)
    # The plane is x + y + z = 2, so the distance is (2 - sum) / sqrt 3.
    assert knee_distances(values, ["minimize"] * 3) == pytest.approx(np.array([0, 0, 0, 0.4, 0.2]) / np.sqrt(3))
    assert knee_index(values, ["minimize"] * 3) == 3


def test_extreme_of_an_objective_is_the_best_in_the_others_among_ties() -> None:
    # Points 0 and 1 are both best in the first objective; 1 has the smaller sum, so the plane goes through points 1,
    # 2 and 3. Its normal follows from Cramer's rule.
    values = np.array([[0, 1, 0.9], [0, 0.2, 1], [1, 0, 1], [1, 1, 0], [0.4, 0.3, 0.5]], dtype=float)
    extremes = values[1:4]
    volume = np.linalg.det(extremes)
    normal = np.array([np.linalg.det(np.where(np.arange(3) == j, 1.0, extremes)) / volume for j in range(3)])
    assert (normal > 0).all()
    expected = (1 - values @ normal) / np.linalg.norm(normal)
    assert knee_distances(values, ["minimize"] * 3) == pytest.approx(expected)


def test_coinciding_extremes_fall_back_to_equal_weights() -> None:
    # The first point is best in two of the three objectives, so the extremes span no plane.
    values = np.array([[0, 0, 1], [0.4, 0.3, 0.2], [1, 1, 0]], dtype=float)
    assert knee_distances(values, ["minimize"] * 3) == pytest.approx((1 - values.sum(axis=1)) / np.sqrt(3))


def test_small_fronts() -> None:
    assert knee_index(np.empty((0, 2)), BOTH) is None
    assert knee_index([[1.0, 2.0]], BOTH) == 0
    assert knee_index([[2.0, 1.0], [1.0, 2.0]], BOTH) == 1  # equally far from the ideal: the first objective decides
    assert knee_index([[1.0, 2.0], [1.0, 2.0]], BOTH) in (0, 1)


def test_constant_objective_is_ignored() -> None:
    values = np.array([[0, 10, 7], [1, 2, 7], [10, 0, 7]], dtype=float)
    assert knee_index(values, ["minimize"] * 3) == 1


def test_knee_is_restricted_to_eligible_rows() -> None:
    values = np.array([[0, 10], [1, 2], [4, 1], [10, 0]], dtype=float)
    assert knee_index(values, BOTH) == 1
    assert knee_index(values, BOTH, [True, False, True, True]) == 2
    assert knee_index(values, BOTH, [False] * 4) is None
