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


def test_the_device_profile_of_an_engine_has_a_file_of_its_own(run: Run, tmp_path: Path) -> None:
    needs_modules(*MODULES)
    save_tiny_model(tmp_path / "model")
    command = ["profile-device", "--model", tmp_path / "model", "--device", "cpu", "--ranks", "2,4", "--json"]
    own = json.loads(run(*command)[0])
    command += ["--engine", "onnxruntime", "--python", engine_python("onnxruntime")]
    first, second = (json.loads(run(*command)[0]) for _ in range(2))
    assert first["file"] != own["file"]
    assert first["conditions"]["torch_version"].startswith("onnxruntime: onnxruntime")
    assert first["timed_now"] == own["timed_now"]
    assert second["timed_now"] == 0  # read from the file
    assert second["matrices"] == first["matrices"]
    assert {row["rank"] for row in first["matrices"]} == {2, 4}
    assert all(row["dense_s"] > 0 and row["decomposed_s"] > 0 for row in first["matrices"])
