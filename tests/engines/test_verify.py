"""`dse verify` and `dse export --format`, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_conformance import POINT, engine_model
from engine_environments import Run, engine_python, needs_modules
from safetensors.torch import load_file, save_file

import dse
from dse.cli.export import FORMATS
from dse.export import EXPORT_FORMATS, export_point
from dse.standalone import export_trials
from dse.study import open_study


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
    command = [sys.executable, "-m", "dse.cli", "verify", str(export), "--trust-remote-code"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified in transformers" in done.stdout
    assert "greedy tokens of 5 of 5 prompts equal" in done.stdout
    card = (export / "README.md").read_text(encoding="utf-8")
    assert card.count("## Verified engines") == 1
    assert card.index("## Verified engines") < card.index("## Provenance")
    assert "equal greedy tokens, largest difference of a log-probability" in card


def test_other_weights_exit_with_1_and_leave_the_card(run: Run, export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(export, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "embed" in name)
    weights[name][5:40] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    card = (folder / "README.md").read_text(encoding="utf-8")
    report = json.loads(run("verify", folder, "--trust-remote-code", "--json", expect=1)[0])
    assert not report["is_valid"]
    assert "log-probabilities must differ by at most" in report["problem"]
    assert (folder / "README.md").read_text(encoding="utf-8") == card


def test_user_errors_exit_with_2_and_one_line(run: Run, export: Path, tmp_path: Path) -> None:
    cases = {
        ("verify", tmp_path / "none"): "must be a folder",
        ("verify", tmp_path): "must hold verification.json",
        ("verify", export, "--engine", "onnxruntime"): "export with `--format onnx` for ONNX Runtime",
        ("verify", export, "--engine", "vlm"): "did you mean 'vllm'?",
        ("verify", export): "runs its Python file modeling_lowrank.py, which must be allowed",
        ("verify", export, "--engine", "vllm", "--python", "/no/python"): "/no/python does not exist",
        ("verify", export, "--option", "length"): "must be NAME=VALUE",
    }
    for arguments, message in cases.items():
        _, errors = run(*arguments, expect=2)
        assert message in errors
        assert len(errors.strip().splitlines()) == 1


def test_a_missing_engine_is_noticed_before_the_model_is_loaded(
    run: Run, low_rank_trial: tuple[Path, int], tmp_path: Path
) -> None:
    study, trial = low_rank_trial
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    for form, remedy in (("onnx", "lowrank-dse[onnx]"), ("openvino", "lowrank-dse[openvino]")):
        _, errors = run(
            "export", study, "--trial", trial, "--out", tmp_path / form, "--format", form,
            "--python", bare / "bin" / "python", expect=2,
        )  # fmt: skip
        assert remedy in errors
        assert "loading" not in errors
        assert not (tmp_path / form).exists()


def test_an_unknown_format_names_the_known_ones(run: Run, low_rank_trial: tuple[Path, int], tmp_path: Path) -> None:
    study, trial = low_rank_trial
    errors = run("export", study, "--trial", trial, "--out", tmp_path / "x", "--format", "onx", expect=2)[1]
    assert "transformers, dense, onnx, openvino, decilm" in errors
    assert "did you mean 'onnx'?" in errors
    errors = run("export", study, "--trial", trial, "--out", tmp_path / "x", "--format", "onnx", "--dense", expect=2)[1]
    assert "`--dense` stands for `--format dense`" in errors


def test_the_command_line_lists_every_format() -> None:
    assert {name: form.summary for name, form in EXPORT_FORMATS.items()} == FORMATS


def test_dense_is_an_alias(run: Run, low_rank_trial: tuple[Path, int], tmp_path: Path) -> None:
    study, trial = low_rank_trial
    printed = run("export", study, "--trial", trial, "--out", tmp_path / "dense", "--dense", "--json")[0]
    assert json.loads(printed)[0]["format"] == "dense"
    expected = json.loads((tmp_path / "dense" / "verification.json").read_text(encoding="utf-8"))
    assert expected["format"] == "dense"
    assert set(expected["verified"]) == {"transformers"}


@pytest.mark.parametrize(
    ("form", "engine", "modules"),
    [("onnx", "onnxruntime", ("onnx", "onnxscript", "onnx_ir")), ("openvino", "openvino", ("openvino",))],
)
def test_a_graph_from_the_command_line(
    run: Run, form: str, engine: str, modules: tuple[str, ...], low_rank_trial: tuple[Path, int], tmp_path: Path
) -> None:
    needs_modules(*modules)
    engine_python(engine)
    study, trial = low_rank_trial
    assert (
        f"verified in {engine}" in run("export", study, "--trial", trial, "--out", tmp_path / form, "--format", form)[0]
    )
    again = json.loads(run("verify", tmp_path / form, "--trust-remote-code", "--json")[0])
    assert again["engine"] == engine
    assert again["is_valid"]
    (tmp_path / form / "config.json").unlink()
    run("verify", tmp_path / form, "--trust-remote-code", expect=2)


def test_an_export_is_verified_in_vllm_before_it_is_put_in_place(tmp_path: Path) -> None:
    """The card then has the commands that serve the folder."""
    python = engine_python("vllm")
    loaded = engine_model()
    bank = dse.FactorBank.build(loaded, [POINT], folder=tmp_path / "bank")
    result = export_point(loaded, POINT, bank, tmp_path / "small", verify_in=["vllm"], python=python)
    assert [report.engine for report in result.engine_reports] == ["vllm"]
    assert result.engine_reports[0].max_difference < 1e-4
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve path/to/this/folder --trust-remote-code --dtype float32" in card
    assert "lm_eval --model vllm --model_args pretrained=path/to/this/folder,trust_remote_code=True" in card
