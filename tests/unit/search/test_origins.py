"""Hypervolume gains of origins and selection probabilities of proposers, by closed forms."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.design_point import DesignPoint, TensorChoice
from dse.evaluation.statistics.intervals import Interval
from dse.pareto import objectives_named
from dse.search.origins import choose_proposer, credited_origins, origin_shares, selection_probabilities
from dse.trial_record import TrialRecord

OBJECTIVES = objectives_named(["accuracy", "parameters"])
REFERENCE = {"accuracy": 0.0, "parameters": 110.0}


def record(
    trial: int, origin: str, accuracy: float, parameters: float, rank: int | None = None, **changes: Any
) -> TrialRecord:
    point = DesignPoint.of({} if origin == "dense" else {"a": TensorChoice("svd", rank or trial + 1)})
    values: dict[str, Any] = {
        "state": "complete",
        "cost": {"parameters": parameters},
        "quantities": {"accuracy": Interval(accuracy)},
    }
    return TrialRecord(trial=trial, origin=origin, point=point, **(values | changes))


def test_hypervolume_is_credited_to_the_origin_that_added_it() -> None:
    # Between the reference (0, 110) and the ideal (1, 0), accuracy a and parameters p span a rectangle a x (1 - p/110).
    records = [
        record(0, "dense", 0.8, 99.0),
        record(1, "ladder", 0.4, 55.0),
        record(2, "sampler", 0.3, 66.0),
        record(3, "refined", 0.6, 55.0),
        record(4, "sampler", 0.9, 11.0, state="failed", quantities={}),
        record(5, "sampler", 0.9, 11.0, feasible=False),
        record(6, "sampler", 0.9, 11.0, state="infeasible"),
    ]
    ladder, sampler, refined = origin_shares(records, OBJECTIVES, REFERENCE, {0, 3})
    assert (ladder.origin, ladder.evaluations, ladder.front_points) == ("ladder", 1, 0)
    assert ladder.hypervolume_gained == pytest.approx(0.4 * 0.5 - 0.4 * 0.1)
    assert (sampler.origin, sampler.evaluations, sampler.hypervolume_gained) == ("sampler", 3, 0.0)
    assert (refined.evaluations, refined.front_points) == (1, 1)
    assert refined.hypervolume_gained == pytest.approx(0.2 * 0.4)


def test_a_retried_trial_is_credited_to_its_first_origin() -> None:
    records = [
        record(1, "refined", 0.5, 60.0, state="interrupted", rank=1),
        record(2, "retried", 0.5, 60.0, state="interrupted", rank=1),
        record(3, "retried", 0.5, 60.0, rank=1),
        record(4, "retried", 0.5, 60.0, rank=9),
    ]
    assert credited_origins(records, OBJECTIVES) == {1: "refined", 2: "refined", 3: "refined", 4: "retried"}


GAINS = st.lists(st.tuples(st.sampled_from(["a", "b", "other"]), st.floats(0, 1)), max_size=30)


@given(GAINS, st.integers(0, 99))
def test_probabilities_sum_to_one_and_selection_is_deterministic(gains: list[tuple[str, float]], seed: int) -> None:
    found = selection_probabilities(gains, ["a", "b"])
    assert sum(found.values()) == pytest.approx(1.0)
    assert min(found.values()) >= 0.15 - 1e-12
    assert choose_proposer(gains, ["a", "b"], random.Random(seed)) == choose_proposer(
        gains, ["a", "b"], random.Random(seed)
    )


def test_proposers_with_more_gain_per_evaluation_are_selected_more_often() -> None:
    assert selection_probabilities([], ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert selection_probabilities([("a", 0.0), ("b", 0.0)], ["a", "b"]) == {"a": 0.5, "b": 0.5}
    found = selection_probabilities([("a", 0.1), ("b", 0.0)] * 10, ["a", "b"])
    assert found["a"] > 0.7
    # The gain counts per evaluation, whatever the number of evaluations.
    even = selection_probabilities([("a", 0.1), ("b", 0.1), ("b", 0.1)] * 5, ["a", "b"])
    assert even["a"] == pytest.approx(0.5, abs=0.02)
    # Old gains are discounted.
    late = selection_probabilities([("a", 0.1)] * 5 + [("b", 0.0), ("a", 0.0)] * 20 + [("b", 0.1)], ["a", "b"])
    assert late["b"] > late["a"]
