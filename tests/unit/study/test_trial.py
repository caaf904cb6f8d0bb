"""One point in, one record out, and the model as it was before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_study import tiny_study

from dse.config import parse_study
from dse.design_point import DesignPoint
from dse.errors import StudyError
from dse.search.proposal import Proposal
from dse.study import StudyListener
from dse.trial.trial_evaluator import new_record
from dse.trial_record import EvaluatedTrial, trial_row
from dse.workers.setup import PreparedStudy, prepare_study


@pytest.fixture
def prepared(tiny_folder: Path) -> PreparedStudy:
    config = tiny_study(tiny_folder, objectives=["accuracy", "decode_latency_s"])
    return prepare_study(parse_study(config), StudyListener())


def weights_of(prepared: PreparedStudy) -> dict[str, tuple[int, bytes]]:
    model = prepared.loaded.model
    return {name: (id(tensor), tensor.numpy().tobytes()) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("phase", ["decompose", "evaluate", "latency"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, StudyError, RuntimeError, MemoryError, ValueError])
def test_the_model_is_dense_again_whatever_happens(
    prepared: PreparedStudy, phase: str, error: type[BaseException]
) -> None:
    before = weights_of(prepared)
    topology = prepared.loaded.topology
    point = DesignPoint.uniform(topology, "svd", 2, [1, 2], ["up", "query"])
    count = 0

    def on_phase(name: str, done: int, total: int) -> None:
        nonlocal count
        count += name == phase
        if name == phase and count >= (2 if phase == "latency" else 1):  # again and again: a batch is halved first
            raise error("stop")

    measurer = dataclasses.replace(prepared.evaluator.measurer, on_phase=on_phase)
    evaluator = dataclasses.replace(prepared.evaluator, on_phase=on_phase, measurer=measurer)
    record = new_record(Proposal({}, "sampler", trial=1), point, topology)
    if error in (KeyboardInterrupt, StudyError):
        with pytest.raises(error):
            evaluator.evaluate(record, None)
    else:
        record, _ = evaluator.evaluate(record, None)
        assert record.state == "failed"
        assert ("OutOfMemoryError: " if error is MemoryError else f"{error.__name__}: stop") in record.reason
    assert weights_of(prepared) == before


def test_a_device_that_does_not_answer_ends_the_run(prepared: PreparedStudy) -> None:
    prepared.evaluator.check_device()
    prepared.loaded.device = torch.device("meta")  # as little to be had of it as of a lost GPU
    with pytest.raises(StudyError, match=r"meta must respond, but is lost .* run the same command again to resume"):
        prepared.evaluator.check_device()


def test_a_row_of_the_table_holds_nothing_that_is_not_known(prepared: PreparedStudy) -> None:
    row = trial_row(new_record(Proposal({}, "dense", trial=3), DesignPoint.dense(), prepared.loaded.topology))
    assert row["trial"] == 3
    assert "accuracy" not in row
    assert row["reduction"] == 0


def test_accuracy_and_measurements_can_be_taken_one_after_the_other(prepared: PreparedStudy) -> None:
    """As on workers with different devices: one evaluates, another one measures."""
    topology, evaluator = prepared.loaded.topology, prepared.evaluator
    baseline = EvaluatedTrial(*evaluator.evaluate(new_record(_proposal(0), DesignPoint.dense(), topology), None))
    point = DesignPoint.uniform(topology, "svd", 2, [1, 2], ["up", "query"])
    first, evaluation = evaluator.evaluate(new_record(_proposal(1), point, topology), baseline, part="accuracy")
    assert first.state == "complete"
    assert evaluation is not None
    assert "decode_latency_s" not in first.quantities
    both, again = evaluator.evaluate(first, baseline, part="measurements")
    assert both.state == "complete"
    assert again is None
    whole, _ = evaluator.evaluate(new_record(_proposal(1), point, topology), baseline)
    assert both.quantities.keys() == whole.quantities.keys()
    assert both.quantities["accuracy"] == whole.quantities["accuracy"]
    assert both.accuracy_drop == whole.accuracy_drop
    assert both.seconds.keys() == whole.seconds.keys()
    assert both.seconds["evaluate"] == first.seconds["evaluate"]
    assert both.seconds["total"] == pytest.approx(sum(both.seconds.values()) / 2)


def _proposal(trial: int) -> Proposal:
    return Proposal({}, "sampler", trial=trial)
