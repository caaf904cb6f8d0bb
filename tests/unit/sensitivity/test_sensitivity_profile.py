"""Sensitivity profiles of tiny models: content, resumption after a kill, files, and refused settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sensitivity_support import FAMILIES, llama, windows

from dse.cost import point_cost
from dse.decomposition import CalibrationWindows, FactorBank
from dse.design_point import REMOVED, DesignPoint, TensorChoice
from dse.errors import CalibrationError, ConfigError, ModelError, ProfileError
from dse.models import LoadedModel
from dse.report.front_png import heat_map_png
from dse.report.sensitivity_heat_map import heat_map_html, heat_map_of
from dse.sensitivity import DivergenceMeter, ProfileSettings, SensitivityProfile, measure_profile, profile_origin
from dse.sensitivity.allocation import allocate_reductions

SETTINGS = ProfileSettings(methods=("svd",), multiple=1, table_kept_fractions=(0.85, 0.6, 0.4))


@pytest.fixture(autouse=True)
def own_banks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSE_CACHE", str(tmp_path_factory.getbasetemp() / "sensitivity-cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_contains_every_tensor_and_block(family: str, tmp_path: Path) -> None:
    loaded = FAMILIES[family]()
    profile = measure_profile(loaded, windows(), settings=SETTINGS, text="test text", folder=tmp_path)
    topology, layers = loaded.topology, loaded.topology.layer_count
    measured = {(part.name, part.method) for part in profile.parts}
    assert {(t.name, "svd") for t in topology.tensors} <= measured
    blocks = [f"layers.{i}.{kind}" for i in range(layers) for kind in ("attention", "mlp")]
    assert {(block, method) for block in blocks for method in ("svd", REMOVED)} <= measured
    assert [u.name for u in profile.table.units] == blocks
    for unit in profile.table.units:
        by_size = sorted(unit.options, key=lambda option: -option.parameters)
        decomposed = [option for option in by_size if not option.removes_block]
        assert [o.divergence for o in decomposed] == sorted(o.divergence for o in decomposed)
        assert {option.is_measured for option in unit.options} == {True, False}
        for option in unit.options:
            saved = unit.dense.parameters - option.parameters
            assert point_cost(topology, DesignPoint(option.choices)).parameters == topology.parameters_dense - saved
    for entry in allocate_reductions(profile.table, [0.05, 0.2, 0.4]):
        assert point_cost(topology, entry.point).parameters == entry.parameters


def test_divergences_equal_those_of_the_meter(tiny: LoadedModel, tmp_path: Path) -> None:
    profile = measure_profile(tiny, windows(), settings=SETTINGS, folder=tmp_path)
    bank = FactorBank.build(tiny, SETTINGS.rank_requests(tiny.topology))
    meter = DivergenceMeter(tiny, windows(), bank)
    unit = profile.table.by_name["layers.2.attention"]
    measured = [option for option in unit.options if option.is_measured and not option.is_dense]
    assert len(measured) == 3 + 1  # three kept fractions, and the removal
    for option in measured:
        divergence = meter.measure(DesignPoint(option.choices))
        # The profile raises a measurement to that of a smaller reduction if it is lower.
        assert option.divergence >= divergence.kl_divergence - 1e-9
        assert option.log_likelihood_drop == pytest.approx(divergence.log_likelihood_drop)
    removed = measured[-1]
    assert removed.removes_block
    assert removed.divergence == pytest.approx(meter.measure(DesignPoint(removed.choices)).kl_divergence)


def test_widths_are_measured_and_interpolated(tmp_path: Path) -> None:
    """Each MLP has its widths as options beside its ranks; those between measurements follow the expected curve."""
    loaded = llama(layers=2)
    settings = dataclasses.replace(SETTINGS, with_widths=True, multiple=4)
    calibration = CalibrationWindows(windows(8, seed=3), "w" * 16, "made")
    profile = measure_profile(loaded, windows(), calibration, settings, folder=tmp_path)
    bank = FactorBank.build(loaded, settings.rank_requests(loaded.topology), calibration)
    meter = DivergenceMeter(loaded, windows(), bank)
    for unit in profile.table.units:
        narrow = {next(iter(dict(o.choices).values())).rank: o for o in unit.options if o.narrows_mlp}
        if unit.kind == "attention":
            assert not narrow
            continue
        # Kept fractions 0.85, 0.75, 0.6, 0.5, 0.4 and 0.25 of 48 channels, in multiples of four.
        assert list(narrow) == [40, 36, 28, 24, 16, 12]
        assert {width for width, option in narrow.items() if option.is_measured} == {36, 24, 12}
        divergences = [option.divergence for option in narrow.values()]
        assert divergences == sorted(divergences)
        point = DesignPoint(narrow[24].choices)
        assert narrow[24].divergence >= meter.measure(point).kl_divergence - 1e-9
        saved = unit.dense.parameters - narrow[24].parameters
        assert point_cost(loaded.topology, point).parameters == loaded.topology.parameters_dense - saved
    assert {(part.name, part.method) for part in profile.parts} >= {(f"layers.{i}.mlp", "width") for i in (0, 1)}
    assert SensitivityProfile.from_json(profile.to_json()) == profile
    # Widths need calibration text, whatever the method is.
    with pytest.raises(CalibrationError):
        measure_profile(loaded, windows(), None, settings, folder=tmp_path / "other")


class _KilledError(Exception):
    pass


def test_a_killed_profile_resumes(tmp_path: Path) -> None:
    tiny = llama(layers=2)
    whole = measure_profile(tiny, windows(), settings=SETTINGS, folder=tmp_path / "whole")

    def kill_half_way(phase: str, done: int, total: int) -> None:
        if phase == "sensitivity" and done > total / 2:
            raise _KilledError

    folder = tmp_path / "killed"
    with pytest.raises(_KilledError):
        measure_profile(tiny, windows(), settings=SETTINGS, folder=folder, progress=kill_half_way)
    (path,) = folder.glob("*/measurements.json")
    document = json.loads(path.read_text())
    known = len(document["divergences"])
    assert (
        0 < known < len(json.loads(next((tmp_path / "whole").glob("*/measurements.json")).read_text())["divergences"])
    )
    assert measure_profile(tiny, windows(), settings=SETTINGS, folder=folder) == whole
    # Entries of the file are not measured again; earlier versions call them `damages`.
    first = next(iter(document["divergences"]))
    document["divergences"][first][0] = 123.0
    path.write_text(json.dumps({"damages" if key == "divergences" else key: value for key, value in document.items()}))
    next(folder.glob("*/profile-*.json")).unlink()
    again = measure_profile(tiny, windows(), settings=SETTINGS, folder=folder)
    assert 123.0 in [part.divergence for part in again.parts]
    for broken in ("{", json.dumps({**document, "divergences": {first: ["x"]}})):
        path.write_text(broken)
        next(folder.glob("*/profile-*.json")).unlink()
        assert measure_profile(tiny, windows(), settings=SETTINGS, folder=folder) == whole


def test_a_profile_file_round_trips_and_another_origin_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    profile = measure_profile(tiny, windows(), settings=SETTINGS, folder=tmp_path)
    path = tmp_path / "copy.json"
    profile.write(path)
    assert SensitivityProfile.read(path, profile.origin) == profile
    old = path.read_text().replace('"divergence"', '"damage"').replace('"parameter_ratio"', '"kept_fraction"')
    (tmp_path / "old.json").write_text(old)
    assert SensitivityProfile.read(tmp_path / "old.json") == profile
    other = llama()
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    changed = LoadedModel("x", None, other.model, other.tokenizer, other.topology, other.device, other.dtype)
    for origin in (
        profile_origin(changed, windows(), None, SETTINGS),
        profile_origin(tiny, windows(seed=9), None, SETTINGS),
        dataclasses.replace(profile.origin, calibration="other"),
    ):
        with pytest.raises(ProfileError, match=r"must be of the same .*copy\.json has"):
            SensitivityProfile.read(path, origin)
    for text in ("[]", "{}", path.read_text()[:-20], json.dumps({**profile.to_json(), "parts": [{}]})):
        path.write_text(text)
        with pytest.raises(ProfileError, match=r"copy\.json"):
            SensitivityProfile.read(path)


def test_profiles_are_restricted_to_names_and_methods(tiny: LoadedModel, tmp_path: Path) -> None:
    calibration = CalibrationWindows(windows(20, seed=2), "f" * 16, "test")
    names = ("layers.1.up", "layers.1.down")
    settings = ProfileSettings(("svd", "whitened_svd"), names, 2, with_removals=False)
    profile = measure_profile(tiny, windows(), calibration, settings, folder=tmp_path)
    assert [unit.name for unit in profile.table.units] == ["layers.1.mlp"]
    assert {c.method for o in profile.table.units[0].options for _, c in o.choices} == {"svd", "whitened_svd"}
    assert all(c.rank % 2 == 0 for o in profile.table.units[0].options for _, c in o.choices)
    assert profile.table.units[0].names == set(names)
    with pytest.raises(CalibrationError, match="need calibration text"):
        measure_profile(tiny, windows(), None, settings, folder=tmp_path)
    with pytest.raises(ProfileError, match="needs decomposable tensors inside the layers"):
        measure_profile(tiny, windows(), settings=dataclasses.replace(SETTINGS, names=("head",)), folder=tmp_path)


def test_stacks_are_options_in_addition_to_their_members(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, with_stacks=True)
    profile = measure_profile(tiny, windows(), settings=settings, folder=tmp_path)
    alone = measure_profile(tiny, windows(), settings=SETTINGS, folder=tmp_path)
    for unit, plain in zip(profile.table.units, alone.table.units, strict=True):
        stack = f"layers.{unit.layer}." + ("query_key_value" if unit.kind == "attention" else "gate_up")
        with_stack = [option for option in unit.options if any(name == stack for name, _ in option.choices)]
        assert {o.choices for o in unit.options} == {o.choices for o in plain.options} | {o.choices for o in with_stack}
        assert len(with_stack) >= 3
        for option in with_stack:
            saved = unit.dense.parameters - option.parameters
            found = point_cost(tiny.topology, DesignPoint(option.choices))
            assert found.parameters == tiny.topology.parameters_dense - saved
    bank = FactorBank.build(tiny, settings.rank_requests(tiny.topology))
    part = next(part for part in profile.parts if part.name == "layers.1.gate_up")
    rank = next(rank for rank in range(1, 30) if rank * (96 + 32) >= (part.parameter_ratio - 1e-9) * 96 * 32)
    point = DesignPoint.of({"layers.1.gate_up": TensorChoice("svd", rank)})
    assert DivergenceMeter(tiny, windows(), bank).measure(point).kl_divergence == pytest.approx(
        part.divergence, rel=1e-4
    )


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a method must be one of .* but got 'sdv'"):
        ProfileSettings(methods=("sdv",))
    with pytest.raises(ConfigError, match=r"but got 'fisher_svd_refit'; measure 'fisher_svd', and use"):
        ProfileSettings(methods=("fisher_svd_refit",))
    with pytest.raises(ConfigError, match="each named once"):
        ProfileSettings(methods=("svd", "svd"))
    with pytest.raises(ConfigError, match="0 < kept fraction < 1"):
        ProfileSettings(block_kept_fractions=(1.0,))
    assert ProfileSettings().fingerprint != ProfileSettings(multiple=4).fingerprint


def test_a_model_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    whole = llama()
    whole.model.lm_head = None
    loaded = LoadedModel("x", None, whole.model, whole.tokenizer, whole.topology, whole.device, whole.dtype)
    with pytest.raises(ModelError, match="needs a model with an output head"):
        measure_profile(loaded, windows(), settings=SETTINGS, folder=tmp_path)


def test_the_heat_map_has_a_row_per_layer_and_a_column_per_role(tiny: LoadedModel, tmp_path: Path) -> None:
    profile = measure_profile(tiny, windows(), settings=SETTINGS, text="<i>text</i>", folder=tmp_path)
    found = heat_map_of(dataclasses.replace(profile, model="<script>alert(1)</script>"))
    assert found.rows == ("0", "1", "2", "3")
    assert found.columns == (*tiny.topology.roles, "attention removed", "mlp removed")
    by_name = {(part.name, part.method): part.divergence for part in profile.parts}
    assert found.values[2][found.columns.index("up")] == by_name["layers.2.up", "svd"]
    assert found.values[1][-1] == by_name["layers.1.mlp", REMOVED]
    page = heat_map_html(found)
    assert "<script>" not in page
    assert "<i>text" not in page
    assert page.count("<td") == 4 * 9
    assert heat_map_png(found).startswith(b"\x89PNG")
    assert TensorChoice.removal().is_removal
