from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError, ProfileError
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_profile import SensitivityProfile
from dse.sensitivity.sensitivity_table import SensitivityTable, TableOrigin

ORIGIN = TableOrigin("a" * 16, "b" * 16, ("whitened_svd",), "c" * 16, 1024, "float32")
QUERY, UP = ("layers.0.query", TensorChoice("svd", 3)), ("layers.0.up", TensorChoice("whitened_svd", 2))


def small_table() -> SensitivityTable:
    attention = Option((QUERY,), 60, 0.25, log_likelihood_drop=0.2, latency_s=0.5, energy_j=2.0)
    mlp = Option((UP,), 40, 0.5, is_measured=False)
    return SensitivityTable(
        (
            Unit("layers.0.attention", 0, "attention", (Option((), 100, 0.0, latency_s=1.0), attention)),
            Unit("layers.0.mlp", 0, "mlp", (Option((), 100, 0.0), mlp)),
        ),
        1000,
        ORIGIN,
        latency_dense_s=3.0,
    )


def profile_of(table: SensitivityTable) -> SensitivityProfile:
    return SensitivityProfile("tiny", "LlamaForCausalLM", "", (), table)


def test_a_table_file_round_trips(tmp_path: Path) -> None:
    table = small_table()
    path = tmp_path / "profile.json"
    profile_of(table).write(path)
    assert SensitivityProfile.read(path).table == table
    assert SensitivityProfile.read(path, ORIGIN).table == table
    assert json.loads(path.read_text())["table"]["fingerprint"] == ORIGIN.fingerprint
    assert len(ORIGIN.fingerprint) == 16


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_of(small_table()).to_json()).replace('"divergence"', '"damage"'))
    assert SensitivityProfile.read(path).table == small_table()


@pytest.mark.parametrize("attribute", [field.name for field in dataclasses.fields(TableOrigin)])
def test_a_table_of_another_origin_is_refused(attribute: str, tmp_path: Path) -> None:
    other = {"methods": ("svd",), "tokens": 2048}.get(attribute, "other")
    wanted = dataclasses.replace(ORIGIN, **{attribute: other})
    assert wanted.fingerprint != ORIGIN.fingerprint
    path = tmp_path / "profile.json"
    profile_of(small_table()).write(path)
    with pytest.raises(
        ProfileError, match=r"must be of the same .*profile\.json has .* is needed; measure it again"
    ) as caught:
        SensitivityProfile.read(path, wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["truncated", "empty", "schema", "units", "rank", "nan"])
def test_a_malformed_file_is_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile_of(small_table()).write(path)
    document = json.loads(path.read_text())
    if fault == "schema":
        document["table"]["schema"] = 99
    elif fault == "units":
        document["table"]["units"] = 3
    elif fault == "rank":
        document["table"]["units"][0]["options"][1]["tensors"]["layers.0.query"]["rank"] = -1
    elif fault == "nan":
        document["table"]["units"][0]["options"][1]["divergence"] = float("nan")
    text = json.dumps(document)
    path.write_text({"truncated": text[:-9], "empty": ""}.get(fault, text))
    with pytest.raises(ProfileError, match=r"profile\.json"):
        SensitivityProfile.read(path)
    with pytest.raises(ProfileError, match="No such file"):
        SensitivityProfile.read(tmp_path / "absent.json")


def test_divergences_add_up_and_scale() -> None:
    table = small_table()
    both = DesignPoint((QUERY, UP))
    assert table.divergence_of(DesignPoint.dense()) == 0
    assert table.divergence_of(both) == 0.75
    assert {name: option.divergence for name, option in table.options_of(DesignPoint((UP,))).items()} == {
        "layers.0.attention": 0.0,
        "layers.0.mlp": 0.5,
    }
    assert table.scaled({"layers.0.mlp": 3.0}).divergence_of(both) == 0.25 + 1.5
    by_rank = table.scaled(lambda unit, option: len(unit.name) * option.parameters)
    assert by_rank.divergence_of(both) == pytest.approx(0.25 * 18 * 60 + 0.5 * 12 * 40)
    assert table.divergence_of(both) == 0.75
    assert by_rank.units[0].dense.divergence == 0


def test_points_outside_the_table_are_refused() -> None:
    table = small_table()
    with pytest.raises(PointError, match=r"'layers\.0\.attention' has no option layers\.0\.query svd 4"):
        table.divergence_of(DesignPoint.of({"layers.0.query": TensorChoice("svd", 4)}))
    with pytest.raises(PointError, match=r"none of its 2 units changes 'layers\.1\.query'"):
        table.divergence_of(DesignPoint.of({"layers.1.query": TensorChoice("svd", 3)}))


def test_inconsistent_tables_are_refused() -> None:
    dense, other = Option((), 10, 0.0), Option((QUERY,), 5, 0.1)
    with pytest.raises(ProfileError, match="must be dense at divergence 0"):
        Unit("layers.0.mlp", 0, "mlp", (other,))
    with pytest.raises(ProfileError, match="must differ"):
        Unit("layers.0.mlp", 0, "mlp", (dense, other, dataclasses.replace(other, divergence=0.2)))
    unit = Unit("layers.0.mlp", 0, "mlp", (dense, other))
    with pytest.raises(ProfileError, match="belong to one unit"):
        SensitivityTable((unit, dataclasses.replace(unit, name="layers.1.mlp")), 100)
    with pytest.raises(ProfileError, match="at most the model's 5 parameters"):
        SensitivityTable((unit,), 5)
    with pytest.raises(ProfileError, match="finite divergence"):
        Option((QUERY,), 5, float("inf"))
