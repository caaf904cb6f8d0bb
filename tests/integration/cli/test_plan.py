"""`dse plan`: forecasts before anything runs, from the config and one rehearsed layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model, word_tokenizer
from tiny_study import tiny_study, write_study

from dse.cli import main
from dse.decomposition import FactorBank
from dse.evaluation.statistics.power import smallest_detectable_drop
from dse.models import load_topology


def plan(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, object]]:
    capsys.readouterr()
    code = main(["plan", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_study_that_fits(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objectives = ["accuracy", "kl_divergence", "decode_latency_s", "parameters"]
    changes = {"objectives": objectives, "sampler": {"name": "tpe"}, "budget": {"trials": 12}}
    study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder, **changes))
    code, found = plan(capsys, study)
    assert (code, found["fits"]) == (0, True)
    phases = {phase["phase"]: phase for phase in found["phases"]}  # type: ignore[attr-defined]
    expected = ["load", "bank", "divergence", "trial: divergence", "profile", "trial: evaluate", "trial: latency"]
    assert list(phases) == expected
    assert all(phase["seconds"] > 0 and phase["host_bytes"] > 2**26 for phase in phases.values())
    assert [phases[name]["repeats"] for name in expected] == [1, 1, 1, 11, 1, 12, 12]
    # The disk holds float32 factors of rank 6 of five tensors per layer.
    topology = load_topology(str(tiny_folder / "model"))
    tensors = [t for t in topology.tensors if t.role in ("query", "key", "value", "attention_output", "up")]
    assert phases["bank"]["disk_bytes"] == sum(4 * 6 * sum(t.shape) for t in tensors)
    documents = found["documents"]
    assert documents["total"] == 24 or documents["total"] is None  # type: ignore[index]
    needed, tolerance = documents["needed"], documents["tolerance"]  # type: ignore[index]
    detectable = smallest_detectable_drop(round(needed * documents["assumed_disagreement"]), needed)  # type: ignore[index]
    assert detectable is not None
    assert detectable <= tolerance
    assert found["total_s"] == pytest.approx(sum(p["seconds"] * p["repeats"] for p in phases.values()))


def test_a_model_larger_than_memory_is_forecast_from_its_config(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config of 900 layers of 85 MB without weights: 76 GB in float32."""
    tokenizer = word_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    config = model.config
    config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64})
    config.update({"num_key_value_heads": 16, "num_hidden_layers": 900})
    config.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    space = {"name": "values", "methods": ["svd"], "layers": {"first": 0}, "ranks": {"absolute": [2]}}
    del space["layers"]
    space["groups"] = {"layers": 900, "roles": {"value": ["value"]}}
    changes = {"model": {"ref": str(tmp_path / "large"), "device": "cpu"}, "space": space}
    study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder, **changes))
    code, found = plan(capsys, study)
    (memory,) = (place for place in found["resources"] if place["name"] == "cpu memory")  # type: ignore[attr-defined]
    weights = 900 * 4 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert weights < memory["needed"] < 1.1 * weights + 2**31
    is_too_large = memory["available"] is not None and memory["available"] < weights
    assert (code, found["fits"]) == ((1, False) if is_too_large else (0, True))
    if is_too_large:
        assert any("`model: {dtype: bfloat16}`" in advice for advice in found["advice"])  # type: ignore[attr-defined]
    load = found["phases"][0]  # type: ignore[index]
    assert load["reason"] == "the weights are not on this machine"
    assert load["disk_bytes"] == pytest.approx(weights, rel=0.01)


def test_user_errors_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "missing.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as refused:
        main(["plan", "quickstart", "--tolerance", "2"])
    assert refused.value.code == 2


def test_the_bank_states_its_own_size(tiny_folder: Path, tmp_path: Path) -> None:
    """The forecast and the check of free space share one function, which agrees with the files."""
    from dse.models import load_model

    loaded = load_model(str(tiny_folder / "model"))
    ranks = {tensor.name: 4 for tensor in loaded.topology.tensors}
    bank = FactorBank.build(loaded, {"svd": ranks, "tucker": ranks}, folder=tmp_path)
    for method, folder in bank.folders.items():
        written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        stated = FactorBank.stored_bytes(loaded.topology, method, ranks)
        assert stated < written < stated + 1024 * len(ranks)  # headers
