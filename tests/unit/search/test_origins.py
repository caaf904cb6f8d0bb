"""What origins earn, and who proposes next, by closed forms."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.pareto import objectives_named
from dse.search.bandit import chances, choose
from dse.search.origins import credited_origins, origin_shares
from dse.trial_record import Interval, TrialRecord

OBJECTIVES = objectives_named(["accuracy", "parameters"])
REFERENCE = {"accuracy": 0.0, "parameters": 110.0}


def record(trial: int, origin: str, accuracy: float, parameters: float, **changes: Any) -> TrialRecord:
    quantities = {"accuracy": Interval(accuracy)}
    point = {"tensors": {} if origin == "dense" else {"a": {"method": "svd", "rank": trial + 1}}}
    values: dict[str, Any] = {
        "state": "complete",
        "point_id": f"p{trial}",
        "cost": {"parameters": parameters},
        "quantities": quantities,
    }
    values |= changes
    return TrialRecord(trial=trial, origin=origin, point=point, point_text="", **values)


def test_hypervolume_is_credited_to_whoever_added_it() -> None:
    # Gains of accuracy a and parameters p against the corner (0, 110) and the ideal (1, 0): rectangles a x (1 - p/110).
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


def test_a_retried_trial_is_its_first_proposers() -> None:
    records = [
        record(1, "refined", 0.5, 60.0, state="interrupted", point_id="same"),
        record(2, "retried", 0.5, 60.0, state="interrupted", point_id="same"),
        record(3, "retried", 0.5, 60.0, point_id="same"),
        record(4, "retried", 0.5, 60.0, point_id="another"),
    ]
    assert credited_origins(records, OBJECTIVES) == {1: "refined", 2: "refined", 3: "refined", 4: "retried"}


GAINS = st.lists(st.tuples(st.sampled_from(["a", "b", "other"]), st.floats(0, 1)), max_size=30)


@given(GAINS, st.integers(0, 99))
def test_chances_are_chances_and_the_same_history_chooses_the_same(gains: list[tuple[str, float]], seed: int) -> None:
    found = chances(gains, ["a", "b"])
    assert sum(found.values()) == pytest.approx(1.0)
    assert min(found.values()) >= 0.15 - 1e-12
    assert choose(gains, ["a", "b"], random.Random(seed)) == choose(gains, ["a", "b"], random.Random(seed))


def test_who_gains_more_per_evaluation_proposes_more_often() -> None:
    assert chances([], ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert chances([("a", 0.0), ("b", 0.0)], ["a", "b"]) == {"a": 0.5, "b": 0.5}
    found = chances([("a", 0.1), ("b", 0.0)] * 10, ["a", "b"])
    assert found["a"] > 0.7
    # Half the gain per evaluation is half the reward, however many evaluations it took.
    even = chances([("a", 0.1), ("b", 0.1), ("b", 0.1)] * 5, ["a", "b"])
    assert even["a"] == pytest.approx(0.5, abs=0.02)
    # What was gained long ago fades.
    late = chances([("a", 0.1)] * 5 + [("b", 0.0), ("a", 0.0)] * 20 + [("b", 0.1)], ["a", "b"])
    assert late["b"] > late["a"]
