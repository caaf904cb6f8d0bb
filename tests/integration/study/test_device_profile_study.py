"""Whole studies that ask the device profile: `only_if_faster` and `predict_latency`, over scripted timings on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from study_support import Watcher, evaluated, outcome, stop
from tiny_study import tiny_study, write_study

from dse.cli import main
from dse.cost import break_even_rank
from dse.design_point import DesignPoint, TensorChoice
from dse.measurement.device_profile import model_profile
from dse.measurement.device_profile.model_profile import ModelProfile, Phase
from dse.measurement.device_profile.product_timings import ProductShape
from dse.models import LoadedModel, load_model
from dse.runtime import timings_for
from dse.runtime.products import LAYOUTS
from dse.study import open_study, run_study

START_S = 3e-6
ENTRY_S = 1e-8
"""A product takes so long whatever its size, and so much for each entry of its weight and row of its input."""


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder / "model"), device="cpu")


def seconds(shape: ProductShape) -> float:
    return START_S + ENTRY_S * shape.weight_entries * shape.rows


def every_shape(profile: ModelProfile, phases: tuple[Phase, ...]) -> set[ProductShape]:
    """All products of points that decompose any subset of the tensors of a group at ranks 2 and 6, and dense."""
    topology, found = profile.topology, set()
    groups: dict[Any, list[str]] = {}
    for tensor in topology.tensors:
        groups.setdefault(id(profile.group_of(tensor.name)), []).append(tensor.name)
    for names in groups.values():
        choices = [{}]  # type: list[dict[str, TensorChoice]]
        for name in names:
            ranks = [r for r in (2, 6) if r <= break_even_rank(*topology[name].shape)]
            choices += [{**c, name: TensorChoice("svd", rank)} for c in choices for rank in ranks]
        for choice in choices:
            for phase in phases:
                found |= set(profile.shapes(DesignPoint.of(choice), phase))
    return found


@pytest.fixture
def scripted(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelProfile:
    """The profile of the tiny model, its timings written into the user's cache before anything asks for them."""
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    profile = model_profile(loaded, timings_for(loaded.model))
    shapes = every_shape(profile, PHASES)
    known = {shape.key(layout): seconds(shape) for shape in shapes for layout in LAYOUTS}
    path = profile.timings.path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"conditions": asdict(profile.timings.conditions), "seconds": known}))
    return model_profile(loaded, timings_for(loaded.model))


PHASES = (Phase.of("prefill", 1, 8), Phase.of("decode", 1, 8))


def study_of(folder: Path, objectives: list[str], **measurement: Any) -> dict[str, Any]:
    space = {**tiny_study(folder)["space"], "limits": {}}
    return tiny_study(
        folder, objectives=objectives, space=space, measurement={"mode": "fast", **measurement}, budget={"trials": 7}
    )


def test_the_script_makes_some_ranks_faster_and_others_not(scripted: ModelProfile) -> None:
    """A second product costs 3 us, an entry 10 ns: rank 2 of 32 x 32 saves 9 us, rank 6 of 16 x 32 only 2.2 us."""
    decode = PHASES[1]
    assert scripted.is_faster("layers.0.query", TensorChoice("svd", 2), decode)
    assert not scripted.is_faster("layers.0.key", TensorChoice("svd", 6), decode)
    assert scripted.is_faster("layers.0.up", TensorChoice("svd", 6), decode)


def test_only_what_is_faster_is_decomposed(
    scripted: ModelProfile, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latency is no objective here, so that nothing but the profile decides; decoding is what counts then."""
    plain = study_of(tiny_folder, ["accuracy", "parameters"])
    asked = study_of(tiny_folder, ["accuracy", "parameters"], only_if_faster=True)
    file = write_study(tmp_path / "study.yaml", asked)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_study(asked, out=out, listener=Watcher(during={3: stop}))
    assert main(["run", str(file), "--out", str(out)]) == 0
    study, free = open_study(out), run_study(plain, out=tmp_path / "plain")
    assert study.evaluated_trials == 7
    assert outcome(run_study(asked, out=tmp_path / "whole")) == outcome(study)
    named = {name: choice["rank"] for r in evaluated(study) for name, choice in r.point["tensors"].items()}
    assert named
    for record in evaluated(study):
        for name, choice in record.point["tensors"].items():
            assert scripted.is_faster(name, TensorChoice("svd", choice["rank"]), PHASES[1])
    # Without the option the same sampler decomposes keys at rank 6, which the profile calls slower.
    slow = [
        (name, choice["rank"])
        for record in evaluated(free)
        for name, choice in record.point["tensors"].items()
        if not scripted.is_faster(name, TensorChoice("svd", choice["rank"]), PHASES[1])
    ]
    assert slow
    capsys.readouterr()
    assert main(["front", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["front"]
    assert main(["run", str(file), "--out", str(out)]) == 0  # nothing is left to do


def test_a_space_without_anything_faster_is_refused(
    scripted: ModelProfile, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"name": "slow", "methods": ["svd"], "roles": ["key"], "ranks": {"absolute": [6]}}
    study = {**study_of(tiny_folder, ["accuracy", "parameters"], only_if_faster=True), "space": space}
    file = write_study(tmp_path / "study.yaml", study)
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "needs something that is faster decomposed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # the compiler stack's own
def test_predicted_latencies_are_marked_wherever_they_stand(
    scripted: ModelProfile, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives = ["accuracy", "decode_latency_s", "parameters"]
    config = study_of(tiny_folder, objectives, predict_latency=True)
    file, out = write_study(tmp_path / "study.yaml", config), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=out, listener=Watcher(during={3: stop}))
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
        # The closed form: the dense model's measured latency less what the products take less.
        assert record.predicted == ("prefill_latency_s", "decode_latency_s")
        assert record.latency is None or not record.latency
        point = DesignPoint.from_json(record.point, scripted.topology)
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


def test_a_rank_multiple_left_to_the_device_is_settled_once(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The matrices here are smaller than a tile: 1. A study that began at 2 goes on at 2 wherever it is resumed."""
    study = {**tiny_study(tiny_folder), "budget": {"trials": 3}}

    def at(multiple: int | str) -> dict[str, Any]:
        space = {**study["space"], "ranks": {**study["space"]["ranks"], "multiple": multiple}}
        return {**study, "space": space}

    free = run_study(at("device"), out=tmp_path / "free")
    assert free.config.space.ranks.multiple == 1
    assert outcome(free) == outcome(run_study(at(1), out=tmp_path / "one"))
    begun = run_study(at(2), out=tmp_path / "two")
    file = write_study(tmp_path / "study.yaml", {**at("device"), "budget": {"trials": 5}})
    assert main(["run", str(file), "--out", str(tmp_path / "two")]) == 0
    longer = open_study(tmp_path / "two")
    assert longer.config.space.ranks.multiple == 2
    assert longer.evaluated_trials == 5
    assert outcome(longer)[:3] == outcome(begun)[:3]


def test_a_space_that_waits_for_a_device_has_no_size_yet(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"name": "tiles", "methods": ["svd"], "ranks": {"absolute": [2, 6], "multiple": "device"}}
    file = tmp_path / "space.yaml"
    file.write_text(json.dumps(space))
    model = str(tiny_folder / "model")
    assert main(["space", str(file), "--model", model]) == 2
    assert "`dse profile-device --space` tells the number" in capsys.readouterr().err
    told = ["profile-device", "--space", str(file), "--model", model, "--prompt", "8", "--json"]
    assert main(told) == 0
    assert json.loads(capsys.readouterr().out)["rank_multiple"] == 1
