"""ONNX Runtime as an engine."""

from __future__ import annotations

from typing import ClassVar

from engine_conformance import EngineConformance


class TestOnnxRuntimeEngine(EngineConformance):
    engine: ClassVar[str] = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnx_ir")
