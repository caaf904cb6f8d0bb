from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from dse.errors import ConfigError
from dse.pareto import Objective, objectives_named, reference_point
from dse.report.trials_table import front_hypervolume, front_table, mark_front

TWO = objectives_named(["accuracy", "parameters"])
MakeTrials = Callable[..., pd.DataFrame]


@pytest.fixture
def trials(make_trials: MakeTrials) -> pd.DataFrame:
    return make_trials(
        [
            {"accuracy": 0.7, "parameters": 100.0},
            {"accuracy": 0.6, "parameters": 60.0, "reduction": 0.4},
            {"accuracy": 0.5, "parameters": 70.0, "reduction": 0.3},  # dominated by trial 1
            {"accuracy": 0.69, "parameters": 80.0, "reduction": 0.2},
            {"accuracy": 0.99, "parameters": 1.0, "state": "failed"},
            {"accuracy": 0.99, "parameters": 1.0, "feasible": False},
            {"accuracy": 0.99, "parameters": None},
            {"accuracy": 0.69, "parameters": 80.0, "reduction": 0.2, "state": "duplicate"},
            {"accuracy": 0.69, "parameters": 80.0, "reduction": 0.2},  # another point with the values of trial 3
        ]
    )


def test_only_complete_feasible_and_measured_trials_are_on_the_front(trials: pd.DataFrame) -> None:
    marked = mark_front(trials, TWO)
    assert marked.loc[marked["on_front"], "trial"].tolist() == [0, 1, 3, 8]
    assert not trials["on_front"].any(), "the input table must not change"


def test_front_is_sorted_by_reduction_and_marks_the_dense_row(trials: pd.DataFrame) -> None:
    front = front_table(trials.iloc[::-1], TWO)
    assert front["trial"].tolist() == [0, 3, 8, 1]
    assert front["is_dense"].tolist() == [True, False, False, False]
    assert front.index.tolist() == [0, 1, 2, 3]


def test_dominated_dense_row_is_kept_as_reference(make_trials: MakeTrials) -> None:
    trials = make_trials([{"accuracy": 0.7, "parameters": 100.0}, {"accuracy": 0.71, "parameters": 90.0}])
    front = front_table(trials, TWO)
    assert front[["trial", "is_dense", "on_front"]].to_numpy().tolist() == [[0, True, False], [1, False, True]]


def test_infeasible_dense_row_is_kept_as_reference(trials: pd.DataFrame) -> None:
    trials.loc[0, "feasible"] = False
    front = front_table(trials, TWO)
    assert front.loc[front["is_dense"], ["trial", "on_front"]].to_numpy().tolist() == [[0, False]]


def test_front_without_a_complete_dense_trial(trials: pd.DataFrame) -> None:
    trials.loc[0, "state"] = "failed"
    front = front_table(trials, TWO)
    assert front["trial"].tolist() == [3, 8, 1]
    assert not front["is_dense"].any()


def test_table_read_from_csv_has_the_same_front(
    study_trials: pd.DataFrame, three: tuple[Objective, ...], tmp_path: object
) -> None:
    path = f"{tmp_path}/trials.csv"
    study_trials.to_csv(path, index=False)
    expected = front_table(study_trials, three)
    assert len(expected) > 3
    assert front_table(pd.read_csv(path), three)["trial"].tolist() == expected["trial"].tolist()


def test_missing_feasibility_counts_as_infeasible(trials: pd.DataFrame) -> None:
    trials["feasible"] = trials["feasible"].astype("boolean")
    trials.loc[1, "feasible"] = pd.NA
    marked = mark_front(trials, TWO)
    assert marked.loc[marked["on_front"], "trial"].tolist() == [0, 2, 3, 8]


def test_hypervolume_matches_hand_calculation(trials: pd.DataFrame) -> None:
    reference = reference_point(TWO, {"accuracy": 0.7, "parameters": 100.0})
    # Accuracy from 0 to 1, parameters from 110 to 0: the boxes of trials 1, 3 and 0.
    by_hand = 0.6 * 50 / 110 + (0.69 - 0.6) * 30 / 110 + (0.7 - 0.69) * 10 / 110
    assert front_hypervolume(trials, TWO, reference) == pytest.approx(by_hand)


def test_missing_columns_are_named(trials: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="'decode_latency_s'"):
        front_table(trials, objectives_named(["accuracy", "decode_latency_s"]))
    with pytest.raises(ConfigError, match="at least one objective"):
        front_table(trials, ())
    with pytest.raises(ConfigError, match="lacks 'parameters'"):
        front_hypervolume(trials, TWO, {"accuracy": 0.0})
