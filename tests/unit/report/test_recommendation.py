from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.errors import ConfigError, StudyError
from dse.pareto import Objective, objectives_named
from dse.report.recommendation import recommend
from dse.report.trials_table import front_table

THREE = objectives_named(["accuracy", "decode_latency_s", "parameters"])
MakeTrials = Callable[..., pd.DataFrame]


def _row(drop: float, latency: float, parameters: float, half: float | None = 0.01, **other: Any) -> dict[str, Any]:
    """One trial; the dense model has accuracy 0.7, a latency of 0.040 s and 100 parameters."""
    row = {
        "accuracy": 0.7 - drop,
        "accuracy_drop": drop,
        "accuracy_drop_low": math.nan if half is None else drop - half,
        "accuracy_drop_high": math.nan if half is None else drop + half,
        "decode_latency_s": 0.04 * latency,
        "parameters": 100.0 * parameters,
        "reduction": 1 - parameters,
    }
    return row | other


@pytest.fixture
def trials(make_trials: MakeTrials) -> pd.DataFrame:
    return make_trials(
        [
            _row(0.0, 1.0, 1.0, 0.0),
            _row(0.005, 0.95, 0.9),  # within 2 points, and so is its bound
            _row(0.015, 0.8, 0.8),  # within 2 points, but its bound is 2.5
            _row(0.04, 0.6, 0.7),
            _row(0.001, 0.7, 0.6, state="failed"),
            _row(0.001, 0.7, 0.6, feasible=False),
        ]
    )


def test_recommends_the_cheapest_certified_trial_and_names_the_cheapest_by_point_estimate(trials: pd.DataFrame) -> None:
    found = recommend(trials.assign(accuracy_drop_documents=400), THREE, max_accuracy_drop=0.02)
    assert (found.trial, found.point_id, found.meets_bound, found.bound_trial) == (1, "point0000001", True, 1)
    assert (found.estimate_trial, found.near_miss_trial) == (2, 2)
    assert found.cost_ratio == pytest.approx(math.sqrt(0.95 * 0.9))
    assert (found.accuracy_drop, found.accuracy_drop_low, found.accuracy_drop_high) == pytest.approx(
        (0.005, -0.005, 0.015)
    )
    # Trial 2 loses 1.5 ± 1 pts: halving the half-width takes four times the documents.
    assert (found.documents_to_settle, found.more_documents) == (1600, 1200)
    assert found.reason == (
        "Trial 1 is the cheapest trial whose 95 % upper bound is within an accuracy drop of 2 pts (x0.92 of dense, the"
        " geometric mean of decode latency x0.95 and parameters x0.90); it removes 10.0 % of the parameters and loses"
        " 0.50 pts of accuracy (95 % interval of the drop -0.50 to +1.50 pts). By point estimate, trial 2 is cheaper"
        " (x0.80 of dense, the geometric mean of decode latency x0.80 and parameters x0.80): it loses 1.50 pts of"
        " accuracy (95 % interval of the drop +0.50 to +2.50 pts); about 1,200 more documents (1,600 in total) would"
        " settle it if the drop stays as estimated."
    )
    json.dumps(asdict(found), allow_nan=False)


def test_recommends_by_point_estimate_if_no_bound_is_within_the_tolerance(trials: pd.DataFrame) -> None:
    found = recommend(trials.assign(accuracy_drop_documents=400), THREE, max_accuracy_drop=0.01)
    assert (found.trial, found.meets_bound, found.bound_trial) == (1, False, None)
    assert (found.estimate_trial, found.near_miss_trial, found.nearest_miss_trial) == (1, 1, None)
    assert found.documents_to_settle == 1600
    assert "is the cheapest by point estimate within an accuracy drop of 1 pts" in found.reason
    assert "It is not certified: no trial's upper bound is within the tolerance; about 1,200 more" in found.reason


def test_nearest_miss_within_noise_reports_the_documents_that_would_settle_it(trials: pd.DataFrame) -> None:
    found = recommend(trials.assign(accuracy_drop_documents=400), THREE, max_accuracy_drop=0.002)
    assert (found.trial, found.nearest_miss_trial, found.near_miss_trial) == (None, 1, 1)
    # 0.3 pts over the tolerance with a half-width of 1 pt: (1 / 0.3)^2 times the documents.
    assert found.documents_to_settle == math.ceil(400 * (0.01 / 0.003) ** 2)
    assert "would settle it" in found.reason
    certain = recommend(trials.loc[[0, 3]].assign(accuracy_drop_documents=400), THREE, max_accuracy_drop=0.02)
    assert (certain.nearest_miss_trial, certain.near_miss_trial) == (3, None)


def test_certified_trial_that_is_also_the_cheapest_by_point_estimate(trials: pd.DataFrame) -> None:
    found = recommend(trials, THREE, max_accuracy_drop=0.025)
    assert (found.trial, found.meets_bound, found.bound_trial, found.estimate_trial) == (2, True, 2, 2)
    assert found.near_miss_trial is None
    assert found.reason.endswith("It is also the cheapest by point estimate.")


def test_drop_equal_to_the_tolerance_fits_despite_rounding(make_trials: MakeTrials) -> None:
    drop = 0.61 - 0.59  # 0.020000000000000018
    assert drop > 0.02
    trials = make_trials([_row(0.0, 1.0, 1.0), _row(drop, 0.9, 0.9)])
    assert recommend(trials, THREE, max_accuracy_drop=0.02).trial == 1


def test_geometric_mean_weighs_costs_equally(make_trials: MakeTrials) -> None:
    trials = make_trials([_row(0.0, 1.0, 1.0), _row(0.01, 0.5, 0.98), _row(0.01, 0.7, 0.72)])
    found = recommend(trials, THREE, max_accuracy_drop=0.02)
    assert found.trial == 1
    assert found.cost_ratio == pytest.approx(math.sqrt(0.5 * 0.98))


def test_paired_ratio_takes_precedence_over_the_quotient(make_trials: MakeTrials) -> None:
    trials = make_trials([_row(0.0, 1.0, 1.0), _row(0.01, 0.5, 0.9, decode_latency_s_ratio=0.9), _row(0.01, 0.8, 0.9)])
    assert recommend(trials, THREE, max_accuracy_drop=0.02).trial == 2


def test_smallest_reduction_excludes_trials(trials: pd.DataFrame) -> None:
    found = recommend(trials, THREE, max_accuracy_drop=0.02, min_reduction=0.3)
    assert found.trial is None
    assert found.nearest_miss_trial == 3
    assert found.nearest_miss_reason == (
        "it loses 4.00 pts of accuracy (95 % interval of the drop +3.00 to +5.00 pts), 2.00 pts over the tolerance"
    )
    assert "a reduction of at least 30.0 %" in found.reason


def test_nearest_miss_with_too_little_reduction(trials: pd.DataFrame) -> None:
    found = recommend(trials, THREE, max_accuracy_drop=0.02, min_reduction=0.21)
    assert found.nearest_miss_trial == 2
    assert found.nearest_miss_reason == "it removes only 20.0 % of the parameters"


def test_dense_model_is_never_recommended(make_trials: MakeTrials) -> None:
    found = recommend(make_trials([_row(0.0, 1.0, 1.0)]), THREE, max_accuracy_drop=0.5)
    assert found.trial is None
    assert found.nearest_miss_trial is None
    assert found.knee_trial is None
    assert "no decomposed trial" in found.reason


def test_trial_that_saves_nothing_is_not_recommended(make_trials: MakeTrials) -> None:
    found = recommend(make_trials([_row(0.0, 1.0, 1.0), _row(-0.01, 1.1, 1.0)]), THREE, max_accuracy_drop=0.5)
    assert found.trial is None
    assert found.nearest_miss_reason == "it saves nothing (decode latency x1.10 and parameters x1.00 of dense)"


def test_gain_in_accuracy_and_missing_interval_are_reported(make_trials: MakeTrials) -> None:
    found = recommend(make_trials([_row(0.0, 1.0, 1.0), _row(-0.01, 0.9, 0.9, None)]), THREE, max_accuracy_drop=0.0)
    assert found.trial == 1
    assert found.meets_bound is False
    assert found.reason.endswith("gains 1.00 pts of accuracy; the confidence interval is unknown.")


def test_drop_is_computed_if_the_table_lacks_it(trials: pd.DataFrame) -> None:
    bare = trials.drop(columns=["accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"])
    found = recommend(bare, THREE, max_accuracy_drop=0.02)
    assert found.trial == 2
    assert found.accuracy_drop == pytest.approx(0.015)
    assert found.accuracy_drop_high is None


def test_without_cost_objectives_cost_is_the_number_of_parameters(trials: pd.DataFrame) -> None:
    quality = objectives_named(["accuracy"])
    found = recommend(trials, quality, max_accuracy_drop=0.05)
    assert "(parameters x0.70 of dense)" in found.reason
    assert found.trial == 3
    assert found.cost_ratio == pytest.approx(0.7)


def test_trial_without_a_measured_cost_is_not_a_candidate(trials: pd.DataFrame) -> None:
    trials.loc[2, "decode_latency_s"] = math.nan
    assert recommend(trials, THREE, max_accuracy_drop=0.02).trial == 1


def test_knee_is_independent_of_the_tolerance(trials: pd.DataFrame) -> None:
    assert recommend(trials, THREE, max_accuracy_drop=0.0).knee_trial in (1, 2, 3)


@pytest.mark.parametrize("drop", [-0.01, math.nan, math.inf])
def test_tolerance_must_be_a_number(trials: pd.DataFrame, drop: float) -> None:
    with pytest.raises(ConfigError, match="must be a number >= 0"):
        recommend(trials, THREE, max_accuracy_drop=drop)


@pytest.mark.parametrize("reduction", [-0.1, 1.0, math.nan])
def test_smallest_reduction_must_lie_in_its_interval(trials: pd.DataFrame, reduction: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        recommend(trials, THREE, max_accuracy_drop=0.02, min_reduction=reduction)


def test_recommendation_needs_accuracy_and_the_dense_model(trials: pd.DataFrame) -> None:
    costs = objectives_named(["decode_latency_s", "parameters"])
    with pytest.raises(ConfigError, match="needs accuracy"):
        recommend(trials.drop(columns=["accuracy", "accuracy_drop"]), costs, max_accuracy_drop=0.02)
    trials.loc[0, "state"] = "failed"
    with pytest.raises(StudyError, match="dense model"):
        recommend(trials, THREE, max_accuracy_drop=0.02)


ROWS = st.lists(
    st.tuples(st.floats(-0.05, 0.3), st.floats(0.4, 1.3), st.floats(0.5, 0.99), st.floats(0.0, 0.05)), max_size=8
)


@given(rows=ROWS, tolerance=st.floats(0, 0.2), least=st.none() | st.floats(0, 0.6))
@settings(max_examples=80, deadline=None)
def test_recommended_trial_fits_and_is_the_cheapest(
    make_trials: MakeTrials, rows: list[tuple[float, float, float, float]], tolerance: float, least: float | None
) -> None:
    trials = make_trials([_row(0.0, 1.0, 1.0, 0.0), *(_row(*row) for row in rows)])
    found = recommend(trials, THREE, max_accuracy_drop=tolerance, min_reduction=least)
    costs = {
        index: math.sqrt(latency * parameters)
        for index, (drop, latency, parameters, _) in enumerate(rows, start=1)
        if drop <= tolerance + 1e-9 and 1 - parameters >= (least or 0) - 1e-9
    }
    certified = {i: cost for i, cost in costs.items() if rows[i - 1][0] + rows[i - 1][3] <= tolerance + 1e-9}
    assert (found.trial is None) == (not costs)
    if found.trial is None:
        assert (found.nearest_miss_trial is None) == (not rows)
        assert bool(found.nearest_miss_reason) == bool(rows)
    else:
        assert found.meets_bound == bool(certified)
        assert costs[found.trial] == pytest.approx(min((certified or costs).values()))
        assert found.trial in (certified or costs)
        assert found.estimate_trial is not None
        assert costs[found.estimate_trial] == pytest.approx(min(costs.values()))
        assert found.nearest_miss_trial is None
    if found.knee_trial is not None:
        front = front_table(trials, THREE)
        assert found.knee_trial in front.loc[~front["is_dense"], "trial"].tolist()


def test_recommendation_of_a_realistic_study(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    found = recommend(study_trials, three, max_accuracy_drop=0.03, min_reduction=0.1)
    row = study_trials.set_index("trial").loc[found.trial]
    assert row["accuracy_drop"] <= 0.03
    assert row["reduction"] >= 0.1
    assert row["state"] == "complete"
