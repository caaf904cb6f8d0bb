"""Every engine by its name in study files. A new engine is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from dse.engines.engine import Engine
from dse.engines.onnxruntime_engine import OnnxRuntimeEngine
from dse.engines.openvino_engine import OpenVinoEngine
from dse.engines.transformers_engine import TransformersEngine
from dse.engines.vllm_engine import VllmEngine
from dse.errors import ConfigError, did_you_mean

__all__ = ["ENGINES", "engine_named"]

ENGINES: Mapping[str, Engine] = {
    "transformers": TransformersEngine(),
    "vllm": VllmEngine(),
    "onnxruntime": OnnxRuntimeEngine(),
    "openvino": OpenVinoEngine(),
}


def engine_named(name: str) -> Engine:
    """Look up an engine.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in ENGINES:
        raise ConfigError(
            f"an engine must be one of {', '.join(ENGINES)}, but got '{name}'{did_you_mean(name, ENGINES)}"
        )
    return ENGINES[name]
