"""ONNX Runtime, which runs the folders of `dse export --format onnx`."""

from __future__ import annotations

from typing import ClassVar

from dse.engines.engine import EngineFormat
from dse.engines.worker_engine import WorkerEngine

__all__ = ["OnnxRuntimeEngine"]


class OnnxRuntimeEngine(WorkerEngine):
    """Runs `model.onnx` in batches; options are entries of the session's configuration."""

    name: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime"
    format: ClassVar[EngineFormat] = "onnx"
    packages: ClassVar[tuple[tuple[str, ...], ...]] = (("onnxruntime", "onnxruntime-gpu"), ("numpy",))
    install: ClassVar[str] = "pip install 'lowrank-dse[onnx]'"
    backend: ClassVar[str] = "onnxruntime_backend"
