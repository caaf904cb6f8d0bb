"""What a trial's record carries of its measurements: the grid, attempts, and energy that may be missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_study

from dse.config import parse_study
from dse.design_point import DesignPoint
from dse.errors import ConfigError
from dse.evaluation.statistics.intervals import Interval
from dse.measurement import RaplMeter
from dse.measurement.device_profile import ProductShape, ProductTimings, profile_model
from dse.search.proposal import Proposal
from dse.study import StudyListener
from dse.trial.trial_evaluator import new_record
from dse.trial_record import EvaluatedTrial, TrialRecord, trial_row
from dse.workers.setup import PreparedStudy, prepare_study


def prepared(folder: Path, **changes: Any) -> PreparedStudy:
    return prepare_study(parse_study(tiny_study(folder, tasks=[], **changes)), StudyListener())


def measured(study: PreparedStudy) -> TrialRecord:
    topology = study.loaded.topology
    point = DesignPoint.uniform(topology, "svd", 2, [1, 2], ["up", "query"])
    record, _ = study.evaluator.evaluate(new_record(Proposal({}, "sampler", trial=1), point, topology), None)
    return record


def with_measurer(study: PreparedStudy, **changes: Any) -> PreparedStudy:
    """The study with other measurements."""
    measurer = dataclasses.replace(study.evaluator.measurer, **changes)
    return dataclasses.replace(study, evaluator=dataclasses.replace(study.evaluator, measurer=measurer))


def refuse_batches_above(study: PreparedStudy, largest: int) -> None:
    def too_much(_module: Any, given: Any) -> None:
        if given[0].shape[0] > largest:  # a real refusal of torch's own allocator
            torch.empty(2**60, dtype=torch.uint8)

    study.loaded.model.model.layers[0].register_forward_pre_hook(too_much)


def test_the_first_cell_is_the_objectives_and_one_that_does_not_fit_is_recorded(tiny_folder: Path) -> None:
    study = prepared(tiny_folder, objectives=["decode_latency_s"], measurement={"batch_size": [2, 1, 4]})
    refuse_batches_above(study, 2)
    record = measured(study)
    assert record.state == "complete", record.reason
    assert record.latency is not None
    assert record.latency["cell"] == "batch 2, prompt 8, new 2"
    assert (record.latency["attempts"], record.latency["discarded"]) == (1, [])
    assert record.latency["mode"] == "eager"
    small, large = record.latency["cells"]
    assert small["is_valid"]
    assert (large["is_valid"], large["bytes_asked"]) == (False, 2**60)
    assert f"an allocation of {2**60} bytes failed" in large["reason"]
    row = trial_row(record)
    assert row["cell.b1_p8_n2.decode_ratio"] == small["decode"]["ratio"]
    assert row["cell.b1_p8_n2.prefill_ratio_low"] <= row["cell.b1_p8_n2.prefill_ratio"]
    assert not [name for name in row if name.startswith("cell.b4")]


def test_a_trial_whose_own_cell_does_not_fit_fails_with_the_bytes_asked(tiny_folder: Path) -> None:
    study = prepared(tiny_folder, objectives=["decode_latency_s"], measurement={"batch_size": [4]})
    refuse_batches_above(study, 2)
    record = measured(study)
    assert record.state == "failed"
    assert f"an allocation of {2**60} bytes failed" in record.reason
    assert record.latency is not None
    assert record.latency["bytes_asked"] == 2**60
    assert "decode_latency_s" not in record.quantities


def broken_meter(folder: Path) -> RaplMeter:
    package = folder / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "name").write_text("package-0")
    (package / "max_energy_range_uj").write_text("1000000")
    (package / "energy_uj").write_text("1")
    meter = RaplMeter(folder / "powercap")
    (package / "energy_uj").unlink()
    return meter


@pytest.mark.parametrize("is_objective", [True, False])
def test_invalid_energy_is_missing_and_fails_a_trial_only_where_an_objective_needs_it(
    tiny_folder: Path, tmp_path: Path, is_objective: bool
) -> None:
    study = prepared(tiny_folder, objectives=["parameters"])
    measurer = study.evaluator.measurer
    required = dataclasses.replace(measurer.required, energy=True, valid_energy=is_objective)
    plan = dataclasses.replace(measurer.plan, meter=broken_meter(tmp_path))
    record = measured(with_measurer(study, required=required, plan=plan))
    assert record.state == ("failed" if is_objective else "complete")
    assert record.energy is not None
    assert record.energy["is_valid"] is False
    assert record.energy["prefill"]["windows"][0]["fault"] == "ReadingFailedError"
    assert "energy_uj could not be read" in record.energy["reason"]
    row = trial_row(record)
    assert (row["energy_is_valid"], row.get("energy_per_token_j")) == (False, None)


def test_memory_has_the_cache_of_the_cost(tiny_folder: Path) -> None:
    record = measured(prepared(tiny_folder, objectives=["peak_memory_bytes"]))
    assert record.memory is not None
    assert record.memory["kv_cache_bytes"] == record.cost["kv_cache_bytes_per_token"] * 10
    peak = record.memory["weight_bytes"] + max(record.memory["prefill_rise_bytes"], record.memory["decode_rise_bytes"])
    assert record.quantities["peak_memory_bytes"].value == peak


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        ({"meter": "wattmeter"}, "`measurement.meter`: a meter must be one of"),
        ({"meter": "replay:no.csv"}, "a power trace must be a CSV file"),
        ({"mode": "cuda_graph"}, "CUDA graphs need an NVIDIA GPU"),
        ({"prompt_tokens": [8, 63]}, r"`prompt_tokens \+ new_tokens <= 64` must hold"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_trial(
    tiny_folder: Path, measurement: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available() and "mode" in measurement:
        pytest.skip("this machine has a GPU, so CUDA graphs are available")
    with pytest.raises(ConfigError, match=message):
        prepared(tiny_folder, objectives=["decode_latency_s"], measurement=measurement)


class ScriptedTimings(ProductTimings):
    """A second a multiplication, and ten a product."""

    def seconds(self, shape: ProductShape) -> float:
        return 10.0 + shape.flops / 2


def with_profile(study: PreparedStudy, folder: Path, *, predicts: bool) -> PreparedStudy:
    timings = ScriptedTimings(torch.device("cpu"), torch.float32, 2**20, folder)
    plan = dataclasses.replace(study.plan, profile=profile_model(study.loaded, timings), predicts_latency=predicts)
    return with_measurer(study, plan=plan)


def test_a_predicted_latency_is_dense_less_what_the_products_save_and_marked(tiny_folder: Path, tmp_path: Path) -> None:
    study = prepared(tiny_folder, objectives=["decode_latency_s"])
    study = with_profile(study, tmp_path, predicts=True)
    topology = study.loaded.topology
    dense = new_record(Proposal({}, "dense", trial=0), DesignPoint.dense(), topology)
    measured_s = {"prefill_latency_s": Interval(9e5, 8e5, 1e6), "decode_latency_s": Interval(9e4, 8e4, 1e5)}
    baseline = EvaluatedTrial(dataclasses.replace(dense, quantities=measured_s), None)
    point = DesignPoint.uniform(topology, "svd", 2, [1], ["attention_output"])
    record, _ = study.evaluator.evaluate(new_record(Proposal({}, "sampler", trial=1), point, topology), baseline)
    assert record.state == "complete", record.reason
    saved = 32 * 32 - 2 * (32 + 32)
    assert record.quantities["decode_latency_s"] == Interval(9e4 - saved + 10)
    assert record.quantities["prefill_latency_s"] == Interval(9e5 - 8 * saved + 10)
    assert record.ratios["decode_latency_s"].value == (9e4 - saved + 10) / 9e4
    assert record.predicted == ("prefill_latency_s", "decode_latency_s")
    assert record.latency is None
    assert TrialRecord.from_json(record.to_json()) == record
    row = trial_row(record)
    assert row["decode_latency_s_is_predicted"] is True
    assert trial_row(dense).get("decode_latency_s_is_predicted") is None
