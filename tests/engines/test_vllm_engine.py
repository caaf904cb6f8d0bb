"""vLLM as an engine: continuous batching, its share of a device, and the environment of its worker."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
from engine_conformance import EngineConformance

from dse.engines import ENGINES, EngineSettings
from dse.engines.vllm_engine import visible_device


class TestVllmEngine(EngineConformance):
    engine: ClassVar[str] = "vllm"
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({"enforce_eager": True})


def test_two_sessions_share_the_device() -> None:
    engine = ENGINES["vllm"]
    assert engine.shared(EngineSettings()).options["gpu_memory_utilization"] == 0.45
    given = EngineSettings(options={"gpu_memory_utilization": 0.6, "enforce_eager": True})
    assert engine.shared(given).options == {"gpu_memory_utilization": 0.3, "enforce_eager": True}


def test_a_gpu_is_selected_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert [visible_device(index) for index in (0, 1)] == ["4", "GPU-abc"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_device(1) == "1"
