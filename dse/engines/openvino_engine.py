"""OpenVINO, which runs the folders of `dse export --format openvino`."""

from __future__ import annotations

from typing import ClassVar

from dse.engines.engine import EngineFormat
from dse.engines.worker_engine import WorkerEngine

__all__ = ["OpenVinoEngine"]


class OpenVinoEngine(WorkerEngine):
    """Runs `openvino_model.xml` in batches; options are OpenVINO's own properties, such as `NUM_STREAMS`."""

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    format: ClassVar[EngineFormat] = "openvino"
    packages: ClassVar[tuple[tuple[str, ...], ...]] = (("openvino",), ("numpy",))
    install: ClassVar[str] = "pip install 'lowrank-dse[openvino]'"
    backend: ClassVar[str] = "openvino_backend"
