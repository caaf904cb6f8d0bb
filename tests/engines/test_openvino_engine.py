"""OpenVINO as an engine."""

from __future__ import annotations

from typing import ClassVar

from engine_conformance import EngineConformance


class TestOpenVinoEngine(EngineConformance):
    engine: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino",)
