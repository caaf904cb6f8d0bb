"""What is kept of a study: the table, the records, the facts, the front."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dse.design_point import DesignPoint
from dse.errors import StudyError
from dse.pareto import reference_point
from dse.study import Study, open_study
from dse.trial_record import TrialRecord


@pytest.fixture(scope="module")
def measured(finished_study: Path) -> Study:
    return open_study(finished_study)


def test_trials_csv_has_the_columns_of_its_documentation(measured: Study) -> None:
    table = pd.read_csv(measured.folder.trials_csv)
    assert list(table["trial"]) == [record.trial for record in measured.records]
    assert set(table["state"]) <= {"complete", "failed", "duplicate", "infeasible", "interrupted"}
    names = (
        "trial state reason origin duplicate_of feasible on_front point_id point decomposed_tensors reduction"
        " parameters_dense parameters weight_bytes flops_prefill_per_token flops_decode_per_token"
        " accuracy accuracy_low accuracy_high accuracy_drop accuracy_drop_low accuracy_drop_high"
        " decode_latency_s decode_latency_s_low decode_latency_s_high decode_latency_s_ratio"
        " decode_latency_s_ratio_low decode_latency_s_ratio_high prefill_latency_s"
        " task.tiny_choice.acc task.tiny_choice.acc_stderr task.tiny_choice.documents"
        " seconds_decompose_s seconds_evaluate_s seconds_latency_s seconds_undo_s seconds_total_s"
        " latency_is_valid latency_reason started_at"
    )
    assert set(names.split()) <= set(table.columns)
    assert all(pd.api.types.is_bool_dtype(table[column]) for column in ("feasible", "on_front"))
    complete = table[table["state"] == "complete"]
    for column in ("accuracy", "decode_latency_s", "parameters", "reduction"):
        assert complete[column].notna().all()
        assert pd.api.types.is_numeric_dtype(table[column])
    assert (complete["task.tiny_choice.documents"] == 24).all()
    assert (complete["decode_latency_s"] > 0).all()
    # The dense row is trial 0, and every drop and ratio refers to it.
    dense = table.iloc[0]
    assert dense["decomposed_tensors"] == 0
    assert dense["decode_latency_s_ratio"] == 1
    assert np.allclose(complete["accuracy_drop"], dense["accuracy"] - complete["accuracy"])
    assert np.allclose(complete["decode_latency_s"], complete["decode_latency_s_ratio"] * dense["decode_latency_s"])
    assert np.allclose(complete["reduction"], 1 - complete["parameters"] / dense["parameters"])
    assert (complete["accuracy_drop_low"] <= complete["accuracy_drop"] + 1e-12).all()
    assert (complete["accuracy_drop"] <= complete["accuracy_drop_high"] + 1e-12).all()
    pd.testing.assert_frame_equal(table[["trial", "accuracy"]], measured.trials()[["trial", "accuracy"]])


def test_points_in_the_table_are_points(measured: Study, tiny_folder: Path) -> None:
    from dse.models import load_topology

    topology = load_topology(str(tiny_folder / "model"))
    for _, row in measured.trials().iterrows():
        assert DesignPoint.from_json(row["point"], topology).id == row["point_id"]


def test_a_record_is_full(measured: Study) -> None:
    record = next(record for record in measured.records if record.state == "complete" and not record.is_dense)
    assert record.latency is not None
    assert record.latency["decode"]["candidate"]["count"] == 16  # tokens: four blocks of two generations of two
    assert record.latency["decode"]["baseline"]["p10_s"] <= record.latency["decode"]["baseline"]["p90_s"]
    assert record.latency["device"] == "cpu"
    assert record.latency["clock"]
    assert record.tasks["tiny_choice"]["documents"] == 24
    assert set(record.seconds) == {"decompose", "evaluate", "latency", "undo", "total"}
    assert record.seconds["total"] == pytest.approx(sum(v for k, v in record.seconds.items() if k != "total"))
    assert TrialRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record
    outcomes = np.load(measured.folder.outcomes(record.trial))
    assert outcomes["outcomes_0"].shape == (24,)
    assert outcomes["outcomes_0"].mean() == pytest.approx(record.quantities["accuracy"].value)


def test_facts_of_the_study(measured: Study) -> None:
    facts = measured.attributes["facts"]
    assert len(facts["model_fingerprint"]) == 16
    assert facts["environment"]["packages"]["torch"]
    assert facts["environment"]["cpu"]["model"]
    assert facts["seeds"] == {"sampler": 1, "documents": 0, "calibration": 0}
    assert measured.attributes["objectives"] == ["accuracy", "decode_latency_s", "parameters"]
    assert "Model fingerprint" in measured.facts()


def test_the_reference_of_the_hypervolume_is_fixed_by_the_dense_model(measured: Study) -> None:
    dense = measured.records[0]
    values = {"accuracy": dense.quantities["accuracy"].value, "parameters": dense.cost["parameters"]}
    values["decode_latency_s"] = dense.quantities["decode_latency_s"].value
    assert measured.attributes["reference"] == reference_point(measured.objectives, values)


def test_plot_front_and_recommend(measured: Study) -> None:
    figure = measured.plot_front()
    assert type(figure).__name__ == "Figure"
    advice = measured.recommend(1.0)
    assert advice.trial in set(measured.trials()["trial"])
    nothing = measured.recommend(0.0, min_reduction=0.99)
    assert nothing.trial is None
    assert nothing.nearest_miss_trial is not None


def test_only_complete_trials_have_records_to_export(measured: Study) -> None:
    with pytest.raises(StudyError, match="a trial must be one of this study's"):
        measured.record(999)
    assert measured.record(0).state == "complete"
