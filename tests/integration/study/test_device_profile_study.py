"""Whole studies with `only_if_faster` and `predict_latency`, on scripted timings in the cache folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from study_support import Watcher, evaluated, interrupt, points_and_accuracies
from tiny_study import tiny_study, write_study

from dse.cli import main
from dse.cost import break_even_rank
from dse.design_point import DesignPoint, TensorChoice
from dse.measurement.device_profile import ModelProfile, Phase, ProductShape, profile_model, timings_for
from dse.models import LoadedModel, load_model
from dse.study import open_study, run_study

START_S = 3e-6
ENTRY_S = 1e-8
"""Fixed time of every product, and time per weight entry and input row."""


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder / "model"), device="cpu")


def seconds(shape: ProductShape) -> float:
    return START_S + ENTRY_S * shape.weight_entries * shape.rows


def every_shape(profile: ModelProfile, phases: tuple[Phase, ...]) -> set[ProductShape]:
    """All products of points that decompose tensors at ranks 2 and 6, and those of the dense model."""
    found = {shape for phase in phases for shape in profile.shapes(DesignPoint.dense(), phase)}
    for tensor in profile.topology.tensors:
        for rank in (2, 6):
            if rank <= break_even_rank(*tensor.shape):
                for phase in phases:
                    found |= set(profile.part_shapes(tensor.name, TensorChoice("svd", rank), phase))
    return found


@pytest.fixture
def scripted(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelProfile:
    """The profile of the tiny model, with timings written into the cache folder beforehand."""
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    profile = profile_model(loaded, timings_for(loaded.model))
    shapes = every_shape(profile, PHASES)
    known = {shape.key: seconds(shape) for shape in shapes}
    path = profile.timings.path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"conditions": asdict(profile.timings.conditions), "seconds": known}))
    return profile_model(loaded, timings_for(loaded.model))


PHASES = (Phase.of("prefill", 1, 8), Phase.of("decode", 1, 8))


def study_of(folder: Path, objectives: list[str], **measurement: Any) -> dict[str, Any]:
    space = {**tiny_study(folder)["space"], "limits": {}}
    return tiny_study(folder, objectives=objectives, space=space, measurement=measurement, budget={"trials": 7})


def test_scripted_timings_make_some_ranks_faster_and_others_slower(scripted: ModelProfile) -> None:
    """A second product costs 3 us, an entry 10 ns: rank 2 of 32 x 32 saves 9 us, rank 6 of 16 x 32 only 2.2 us."""
    decode = PHASES[1]
    assert scripted.is_faster("layers.0.query", TensorChoice("svd", 2), decode)
    assert not scripted.is_faster("layers.0.key", TensorChoice("svd", 6), decode)
    assert scripted.is_faster("layers.0.up", TensorChoice("svd", 6), decode)


def test_only_faster_tensors_are_decomposed(
    scripted: ModelProfile, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latency is not an objective here, so only the profile matters, in its default phase decode."""
    plain = study_of(tiny_folder, ["accuracy", "parameters"])
    asked = study_of(tiny_folder, ["accuracy", "parameters"], only_if_faster=True)
    file = write_study(tmp_path / "study.yaml", asked)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_study(asked, out=out, listener=Watcher(during={3: interrupt}))
    assert main(["run", str(file), "--out", str(out)]) == 0
    study, free = open_study(out), run_study(plain, out=tmp_path / "plain")
    assert study.evaluated_trials == 7
    assert points_and_accuracies(run_study(asked, out=tmp_path / "whole")) == points_and_accuracies(study)
    named = {name: choice.rank for r in evaluated(study) for name, choice in r.point.by_name.items()}
    assert named
    for record in evaluated(study):
        for name, choice in record.point.by_name.items():
            assert scripted.is_faster(name, choice, PHASES[1])
    # Without the option the same sampler decomposes keys at rank 6, which the profile calls slower.
    slow = [
        (name, choice.rank)
        for record in evaluated(free)
        for name, choice in record.point.by_name.items()
        if not scripted.is_faster(name, choice, PHASES[1])
    ]
    assert slow
    capsys.readouterr()
    assert main(["front", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["front"]
    assert main(["run", str(file), "--out", str(out)]) == 0  # nothing left to do


def test_a_space_without_faster_tensors_is_refused(
    scripted: ModelProfile, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"name": "slow", "methods": ["svd"], "roles": ["key"], "ranks": {"absolute": [6]}}
    study = {**study_of(tiny_folder, ["accuracy", "parameters"], only_if_faster=True), "space": space}
    file = write_study(tmp_path / "study.yaml", study)
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "needs a tensor that is faster when decomposed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_predicted_latencies_are_marked_everywhere(
    scripted: ModelProfile, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives = ["accuracy", "decode_latency_s", "parameters"]
    config = study_of(tiny_folder, objectives, predict_latency=True)
    file, out = write_study(tmp_path / "study.yaml", config), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=out, listener=Watcher(during={3: interrupt}))
    assert main(["run", str(file), "--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "decode_latency_s x" in line]
    assert lines
    assert all("(predicted)" in line for line in lines)
    study = open_study(out)
    dense, *others = evaluated(study)
    assert len(others) == 6
    assert dense.predicted == ()
    assert dense.latency["is_valid"] is True
    for record in others:
        # In closed form: the dense model's measured latency minus what the products save.
        assert record.predicted == ("prefill_latency_s", "decode_latency_s")
        assert record.latency is None or not record.latency
        point = record.point
        for name, phase in zip(record.predicted, PHASES, strict=True):
            base = dense.quantities[name].value
            assert base is not None
            expected = scripted.predicted_seconds(point, phase, base)
            assert record.quantities[name].value == pytest.approx(expected)
            assert record.quantities[name].low is None
            assert record.ratios[name].value == pytest.approx(expected / base)
    table = pd.read_csv(out / "trials.csv").set_index("trial")
    assert table["decode_latency_s_is_predicted"].tolist()[0] is False or not table["decode_latency_s_is_predicted"][0]
    assert table.loc[[r.trial for r in others], "decode_latency_s_is_predicted"].all()
    front = pd.read_csv(out / "front.csv")
    assert (front["decode_latency_s_is_predicted"] == ~front["is_dense"]).all()
    page = (out / "front.html").read_text()
    body = page[page.index("<main>") : page.index("</main>")]
    assert body.count("predicted") >= int((~front["is_dense"]).sum())
    assert "Decode latency (" in page
    assert "predicted), lower is better" in page  # the axis of the plot
    assert main(["front", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "predicted" in shown
    assert main(["front", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["decode_latency_s_is_predicted"] for row in document["front"]] == [
        not row["is_dense"] for row in document["front"]
    ]
    first, second = others[0].trial, others[1].trial
    if others[0].point_id != others[1].point_id:
        comparison = study.compare(first, second)
        assert {c.name for c in comparison.costs if c.is_predicted} == {"prefill_latency_s", "decode_latency_s"}
    assert main(["front", str(out), "--explain", str(first)]) == 0
    assert "(predicted, dense" in capsys.readouterr().out


def test_rank_multiple_device_is_determined_once_per_study(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The matrices are smaller than a tile, which gives 1. A study that started with 2 keeps 2 when resumed."""
    study = {**tiny_study(tiny_folder), "budget": {"trials": 3}}

    def at(multiple: int | str) -> dict[str, Any]:
        space = {**study["space"], "ranks": {**study["space"]["ranks"], "multiple": multiple}}
        return {**study, "space": space}

    free = run_study(at("device"), out=tmp_path / "free")
    assert free.config.space.ranks.multiple == 1
    assert points_and_accuracies(free) == points_and_accuracies(run_study(at(1), out=tmp_path / "one"))
    begun = run_study(at(2), out=tmp_path / "two")
    file = write_study(tmp_path / "study.yaml", {**at("device"), "budget": {"trials": 5}})
    assert main(["run", str(file), "--out", str(tmp_path / "two")]) == 0
    longer = open_study(tmp_path / "two")
    assert longer.config.space.ranks.multiple == 2
    assert longer.evaluated_trials == 5
    assert points_and_accuracies(longer)[:3] == points_and_accuracies(begun)[:3]


def test_a_space_with_rank_multiple_device_has_no_size_without_a_device(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"name": "tiles", "methods": ["svd"], "ranks": {"absolute": [2, 6], "multiple": "device"}}
    file = tmp_path / "space.yaml"
    file.write_text(json.dumps(space))
    model = str(tiny_folder / "model")
    assert main(["space", str(file), "--model", model]) == 2
    assert "run `dse profile-device --space` and write the number" in capsys.readouterr().err
    arguments = ["profile-device", "--space", str(file), "--model", model, "--prompt", "8", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rank_multiple"] == 1
