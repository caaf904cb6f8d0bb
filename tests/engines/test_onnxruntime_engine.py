"""ONNX Runtime as an engine, and the device profile that its matrix products give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from engine_conformance import EngineConformance
from engine_environments import Run, engine_python, needs_modules
from tiny_models import save_tiny_model

MODULES = ("onnx", "onnxscript", "onnx_ir")


class TestOnnxRuntimeEngine(EngineConformance):
    engine: ClassVar[str] = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = MODULES


def test_the_device_profile_comes_from_the_engine(run: Run, tmp_path: Path) -> None:
    needs_modules(*MODULES)
    save_tiny_model(tmp_path / "model", num_hidden_layers=1)
    command = ["profile-device", "--model", tmp_path / "model", "--device", "cpu", "--ranks", "2,4", "--json"]
    found = json.loads(run(*command, "--engine", "onnxruntime", "--python", engine_python("onnxruntime"))[0])
    assert found["conditions"]["torch_version"].startswith("onnxruntime: onnxruntime")
    assert found["timed_now"] > 0
    assert {row["rank"] for row in found["matrices"]} == {2, 4}
    assert all(row["dense_s"] > 0 and row["decomposed_s"] > 0 for row in found["matrices"])
