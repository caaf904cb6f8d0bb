"""Hugging Face transformers, the reference engine."""

from __future__ import annotations

from typing import ClassVar

from dse.engines.engine import EngineFormat
from dse.engines.worker_engine import WorkerEngine

__all__ = ["TransformersEngine"]


class TransformersEngine(WorkerEngine):
    """Runs a Hugging Face folder eagerly, in batches. A study runs it in its own process, without this worker."""

    name: ClassVar[str] = "transformers"
    title: ClassVar[str] = "transformers"
    format: ClassVar[EngineFormat] = "huggingface"
    packages: ClassVar[tuple[tuple[str, ...], ...]] = (("transformers",), ("torch",))
    install: ClassVar[str] = "pip install transformers torch"
    backend: ClassVar[str] = "transformers_backend"
