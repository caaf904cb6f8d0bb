"""Exact power of McNemar's test against simulation, enumeration and Connor's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dse.evaluation.statistics.intervals import paired_drop
from dse.evaluation.statistics.paired_tests import mcnemar
from dse.evaluation.statistics.power import (
    documents_to_settle,
    mcnemar_power,
    smallest_detectable_change,
    smallest_detectable_drop,
)


@pytest.mark.parametrize(("drop", "discordance", "documents"), [(0.05, 0.1, 300), (0.0, 0.2, 200), (0.03, 0.03, 150)])
def test_power_agrees_with_simulation(drop: float, discordance: float, documents: int) -> None:
    random = np.random.default_rng(1)
    runs = 4000
    chances = [(discordance + drop) / 2, (discordance - drop) / 2, 1 - discordance]
    drawn = random.multinomial(documents, chances, size=runs)
    found = sum(mcnemar(int(losses), int(gains)) <= 0.05 for losses, gains, _ in drawn) / runs
    assert mcnemar_power(drop, discordance, documents) == pytest.approx(found, abs=4 * math.sqrt(0.25 / runs))


def test_power_agrees_with_the_sum_over_all_outcomes() -> None:
    drop, discordance, documents = 0.2, 0.4, 30
    total = 0.0
    for losses in range(documents + 1):
        for gains in range(documents + 1 - losses):
            if mcnemar(losses, gains) <= 0.05:
                cell = [losses, gains, documents - losses - gains]
                total += float(stats.multinomial.pmf(cell, documents, [0.3, 0.1, 0.6]))
    assert mcnemar_power(drop, discordance, documents) == pytest.approx(total, rel=1e-9)


def connor(discordance: float, documents: int) -> float:
    """Connor (1987), Biometrics 43:207, solved for the difference, for the test without continuity correction."""
    a, b = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    root = b * math.sqrt(documents + b**2 - a**2)
    return float(math.sqrt(discordance) * (a * math.sqrt(documents) + root) / (documents + b**2))


@pytest.mark.parametrize(("discordant", "documents"), [(40, 200), (60, 300), (100, 1000), (500, 2500)])
def test_smallest_detectable_drop_is_slightly_above_connors(discordant: int, documents: int) -> None:
    found = smallest_detectable_drop(discordant, documents)
    assert found is not None
    # The exact test is conservative, less so with more disagreements.
    assert connor(discordant / documents, documents) * 0.995 < found < connor(discordant / documents, documents) * 1.05
    assert mcnemar_power(found, discordant / documents, documents) == pytest.approx(0.8, abs=1e-3)


def test_without_disagreements_about_eight_losses_are_detectable() -> None:
    # The exact test rejects from six losses of six; 7.9 expected losses give six or more four times in five.
    found = smallest_detectable_drop(0, 1000)
    assert found is not None
    assert stats.binom.sf(5, 1000, found) == pytest.approx(0.8, abs=1e-3)


def test_too_few_documents_detect_nothing() -> None:
    assert smallest_detectable_drop(2, 5) is None
    assert smallest_detectable_drop(0, 6) is not None
    assert smallest_detectable_change(None) is None


def test_more_documents_detect_smaller_drops() -> None:
    detectable = [smallest_detectable_drop(documents // 10, documents) for documents in (100, 200, 400, 800, 3200)]
    assert all(drop is not None for drop in detectable)
    assert detectable == sorted(detectable, reverse=True)  # type: ignore[type-var]


def test_graded_changes_need_2_8_standard_errors() -> None:
    assert smallest_detectable_change(0.01) == pytest.approx(0.0280158, rel=1e-5)
    random = np.random.default_rng(5)
    change = smallest_detectable_change(0.01)
    assert change is not None
    detected = np.abs(random.normal(change, 0.01, 20_000)) > 0.01 * stats.norm.ppf(0.975)
    assert detected.mean() == pytest.approx(0.8, abs=0.015)


def test_documents_to_settle_move_the_interval_end_to_the_limit() -> None:
    before = np.asarray([1.0] * 12 + [0.0] * 8 + [1.0] * 280)
    after = np.asarray([0.0] * 12 + [1.0] * 8 + [1.0] * 280)
    limit = 0.02
    drop = paired_drop([before], [after])
    assert drop.high is not None
    assert drop.value < limit < drop.high
    needed = documents_to_settle(drop.value, drop.high, limit, drop.documents)
    assert needed is not None
    times = needed / 300
    grown = paired_drop([np.tile(before, math.ceil(times))], [np.tile(after, math.ceil(times))])
    assert grown.high is not None
    assert grown.high == pytest.approx(limit, abs=0.002)
    fewer = paired_drop([np.tile(before, math.floor(times) - 1)], [np.tile(after, math.floor(times) - 1)])
    assert fewer.high is not None
    assert fewer.high > limit


def test_documents_to_settle_in_closed_form() -> None:
    assert documents_to_settle(0.01, 0.03, 0.02, 100) == 400
    assert documents_to_settle(0.03, 0.01, 0.02, 100) == 400
    assert documents_to_settle(0.01, 0.015, 0.02, 100) == 100
    assert documents_to_settle(0.02, 0.03, 0.02, 100) is None
