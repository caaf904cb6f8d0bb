"""`dse verify` and `dse export --format`, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_environments import engine_python, needs_modules
from safetensors.torch import load_file, save_file

import dse
from dse.export import export_point, export_trials
from dse.study import open_study


def run(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dse.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == expect, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache_folder: Path) -> Iterator[None]:
    """The cache of the finished study, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        yield


@pytest.fixture(scope="module")
def low_rank_trial(finished_study: Path) -> tuple[Path, int]:
    """Folder of a study and the number of a trial with factors."""
    study = open_study(finished_study)
    numbers = (int(number) for number in study.trials()["trial"])
    return finished_study, next(number for number in numbers if not study.record(number).point.is_dense)


@pytest.fixture(scope="module")
def export(low_rank_trial: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "small"
    study, trial = low_rank_trial
    export_trials(study, trial, folder)
    return folder


def test_an_export_verifies_again_and_the_card_says_so(export: Path) -> None:
    done = run("verify", export)
    assert "verified in transformers" in done.stdout
    assert "greedy tokens of 5 of 5 prompts equal" in done.stdout
    card = (export / "README.md").read_text(encoding="utf-8")
    assert card.count("## Verified engines") == 1
    assert card.index("## Verified engines") < card.index("## Provenance")
    assert "equal greedy tokens, largest difference of a log-probability" in card


def test_other_weights_exit_with_1_and_leave_the_card(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(export, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "embed" in name)
    weights[name][5:40] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    card = (folder / "README.md").read_text(encoding="utf-8")
    done = run("verify", folder, "--json", expect=1)
    report = json.loads(done.stdout)
    assert not report["is_valid"]
    assert "log-probabilities must differ by at most" in report["problem"]
    assert (folder / "README.md").read_text(encoding="utf-8") == card


def test_user_errors_exit_with_2_and_one_line(export: Path, tmp_path: Path) -> None:
    cases = {
        ("verify", tmp_path / "none"): "must be a folder",
        ("verify", tmp_path): "must hold verification.json",
        ("verify", export, "--engine", "onnxruntime"): "export with `--format onnx` for ONNX Runtime",
        ("verify", export, "--engine", "vlm"): "did you mean 'vllm'?",
        ("verify", export, "--engine", "vllm", "--python", "/no/python"): "/no/python does not exist",
        ("verify", export, "--option", "length"): "must be NAME=VALUE",
    }
    for arguments, message in cases.items():
        done = run(*arguments, expect=2)
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_engine_is_noticed_before_the_model_is_loaded(
    low_rank_trial: tuple[Path, int], tmp_path: Path
) -> None:
    study, trial = low_rank_trial
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    for form, remedy in (("onnx", "lowrank-dse[onnx]"), ("openvino", "lowrank-dse[openvino]")):
        done = run(
            "export", study, "--trial", trial, "--out", tmp_path / form, "--format", form,
            "--python", bare / "bin" / "python", expect=2,
        )  # fmt: skip
        assert remedy in done.stderr
        assert "loading" not in done.stderr
        assert not (tmp_path / form).exists()


def test_an_unknown_format_names_the_known_ones(low_rank_trial: tuple[Path, int], tmp_path: Path) -> None:
    study, trial = low_rank_trial
    done = run("export", study, "--trial", trial, "--out", tmp_path / "x", "--format", "onx", expect=2)
    assert "transformers, dense, onnx, openvino, decilm" in done.stderr
    assert "did you mean 'onnx'?" in done.stderr
    done = run("export", study, "--trial", trial, "--out", tmp_path / "x", "--format", "onnx", "--dense", expect=2)
    assert "`--dense` stands for `--format dense`" in done.stderr


def test_dense_is_an_alias(low_rank_trial: tuple[Path, int], tmp_path: Path) -> None:
    study, trial = low_rank_trial
    done = run("export", study, "--trial", trial, "--out", tmp_path / "dense", "--dense", "--json")
    assert json.loads(done.stdout)[0]["format"] == "dense"
    expected = json.loads((tmp_path / "dense" / "verification.json").read_text(encoding="utf-8"))
    assert expected["format"] == "dense"
    assert set(expected["verified"]) == {"transformers"}


@pytest.mark.parametrize(
    ("form", "engine", "modules"),
    [("onnx", "onnxruntime", ("onnx", "onnxscript", "onnx_ir")), ("openvino", "openvino", ("openvino",))],
)
def test_a_graph_from_the_command_line(
    form: str, engine: str, modules: tuple[str, ...], low_rank_trial: tuple[Path, int], tmp_path: Path
) -> None:
    needs_modules(*modules)
    engine_python(engine)
    study, trial = low_rank_trial
    done = run("export", study, "--trial", trial, "--out", tmp_path / form, "--format", form)
    assert f"verified in {engine}" in done.stdout
    again = json.loads(run("verify", tmp_path / form, "--json").stdout)
    assert again["engine"] == engine
    assert again["is_valid"]
    (tmp_path / form / "config.json").unlink()
    run("verify", tmp_path / form, expect=2)


@pytest.mark.real_model
def test_vllm_verifies_an_export_with_factors(tmp_path: Path) -> None:
    """`dse verify --engine vllm` adds the commands that serve the folder to the card."""
    python = engine_python("vllm")
    loaded = dse.load_model("demo:smollm2-135m-instruct")
    point = dse.DesignPoint.uniform(loaded.topology, "svd", 64, [12, 20])
    bank = dse.FactorBank.build(loaded, [point], folder=tmp_path / "bank")
    export_point(loaded, point, bank, tmp_path / "small")
    done = run("verify", tmp_path / "small", "--engine", "vllm", "--python", python)
    assert "verified in vllm" in done.stdout
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve path/to/this/folder --trust-remote-code --dtype float32" in card
    assert "lm_eval --model vllm --model_args pretrained=path/to/this/folder,trust_remote_code=True" in card
