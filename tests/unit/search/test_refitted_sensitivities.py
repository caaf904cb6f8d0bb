"""Refitting to synthetic divergences with known interactions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dse.design_point import DesignPoint, TensorChoice
from dse.search.refitted_sensitivities import RefittedSensitivities, refit_sensitivities
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

LAYERS = 12


def table_of(seed: int) -> SensitivityTable:
    generator = random.Random(seed)
    units = []
    for layer in range(LAYERS):
        for kind in ("attention", "mlp"):
            base = generator.uniform(0.01, 0.1)
            options = [Option((), 100, 0.0)]
            for rank, size in ((8, 75), (4, 50), (2, 25)):
                choices = ((f"layers.{layer}.{kind}", TensorChoice("svd", rank)),)
                options.append(Option(choices, size, base * ((100 - size) / 100) ** 2))
            units.append(Unit(f"layers.{layer}.{kind}", layer, kind, tuple(options)))
    return SensitivityTable(tuple(units), 10_000)


def random_point(table: SensitivityTable, generator: random.Random) -> DesignPoint:
    taken = generator.sample(table.units, generator.randint(4, 20))
    return DesignPoint(tuple(c for unit in taken for c in generator.choice(unit.options[1:]).choices))


def truth(table: SensitivityTable, point: DesignPoint) -> float:
    """MLP blocks weigh three times as much, deep layers down to half, and the sum is raised to the power 1.3."""
    total = sum(
        option.divergence
        * (3.0 if name.endswith("mlp") else 1.0)
        * (1.0 - 0.5 * table.by_name[name].layer / (LAYERS - 1))
        for name, option in table.options_of(point).items()
    )
    return total**1.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_refitted_table_predicts_later_points_better(seed: int) -> None:
    table, generator = table_of(seed), random.Random(seed)
    points = [random_point(table, generator) for _ in range(50)]
    divergences = [truth(table, point) * math.exp(generator.gauss(0, 0.03)) for point in points]
    model = refit_sensitivities(table, points[:30], divergences[:30])
    later, real = points[30:], np.array(divergences[30:])
    additive = np.array([table.divergence_of(point) for point in later])
    refitted = np.array([model.predict(point) for point in later])
    assert np.abs(np.log(refitted / real)).mean() < 0.15
    assert np.abs(np.log(refitted / real)).mean() < 0.5 * np.abs(np.log(additive / real)).mean()
    assert spearmanr(refitted, real).statistic > spearmanr(additive, real).statistic
    # The fit recovers the truth: MLP weighs more than attention, and the exponent is above 1.
    unit = {kind: table.by_name[f"layers.6.{kind}"] for kind in ("attention", "mlp")}
    ratio = model.weight(unit["mlp"], unit["mlp"].options[1]) / model.weight(
        unit["attention"], unit["attention"].options[1]
    )
    assert 2.0 < ratio < 4.0
    assert model.exponent == pytest.approx(1.3, abs=0.15)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_points_within_noise_do_not_dominate_the_fit(seed: int) -> None:
    table, generator = table_of(seed), random.Random(seed)
    points = [random_point(table, generator) for _ in range(60)]
    slight = [DesignPoint(generator.choice(table.units).options[1].choices) for _ in range(15)]
    noisy = [truth(table, point) + generator.gauss(0, 0.03) for point in slight]  # as large as their divergence
    clean = [truth(table, point) for point in points[:15]]
    model = refit_sensitivities(table, [*slight, *points[:15]], [*noisy, *clean])
    assert min(noisy) < 0
    assert model.points == 30
    errors = [abs(math.log(model.predict(point) / truth(table, point))) for point in points[15:]]
    additive = [abs(math.log(table.divergence_of(point) / truth(table, point))) for point in points[15:]]
    assert np.mean(errors) < 0.5 * np.mean(additive)


def test_without_points_the_table_is_unchanged() -> None:
    table = table_of(0)
    point = random_point(table, random.Random(3))
    dense = refit_sensitivities(table, [DesignPoint.dense()], [0.0])
    for model in (RefittedSensitivities.unfitted(table), refit_sensitivities(table, [], []), dense):
        assert model.predict(point) == pytest.approx(table.divergence_of(point))
        assert model.corrected_table() == table


def test_points_outside_the_table_are_left_out() -> None:
    table, generator = table_of(1), random.Random(1)
    points = [random_point(table, generator) for _ in range(12)]
    divergences = [truth(table, point) for point in points]
    foreign = DesignPoint.of({"layers.0.attention": TensorChoice("svd", 3)})
    model = refit_sensitivities(table, points, divergences)
    mixed = refit_sensitivities(table, [*points, foreign], [*divergences, 1.0])
    np.testing.assert_array_equal(model.log_factors, mixed.log_factors)
    assert (mixed.points, mixed.offered) == (12, 13)
    assert mixed.expected(foreign) == math.inf


@given(st.integers(0, 50), st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_factors_are_positive_finite_and_deterministic(seed: int, divergences: list[float]) -> None:
    table, generator = table_of(seed), random.Random(seed)
    points = [random_point(table, generator) for _ in divergences]
    model = refit_sensitivities(table, points, divergences)
    again = refit_sensitivities(table, points, divergences)
    np.testing.assert_array_equal(model.log_factors, again.log_factors)
    assert all(
        0 < model.weight(unit, option) < math.inf
        for unit in table.units
        for option in unit.options
        if not option.is_dense
    )
    assert model.exponent > 0
    assert model.scale > 0
