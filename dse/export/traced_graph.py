"""What the graph formats share: example inputs with a key-value cache, the names of the ports, and config.json.

A graph is traced from the resident model, to which the point is applied, by the exporters of transformers. It takes a
batch of any size, any number of new tokens and any number of cached ones. Ports have the names that Optimum reads.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dse.errors import ExportError
from dse.models import LoadedModel

__all__ = [
    "check_traceable",
    "dynamic_shapes",
    "example_inputs",
    "port_names",
    "quiet_tracing",
    "tracing_errors",
    "write_graph_config",
]

_CACHED_TOKENS = 4
_NEW_TOKENS = 3
_BATCH = 2
_CACHE_PORT = re.compile(r"(?:(?:input|output)\.)?past_key_values\.layers\.(\d+)\.(keys|values)")
_PARTS = {"keys": "key", "values": "value"}


def check_traceable(loaded: LoadedModel, title: str, extra: str, packages: Sequence[str]) -> None:
    """Check what can be checked before tracing.

    Args:
        loaded: The model.
        title: Name of the format in messages.
        extra: The extra of this package that installs what the format needs.
        packages: Modules that writing needs.

    Raises:
        ExportError: The model does not generate text, or a package is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"an export to {title} needs {', '.join(packages)}, but {', '.join(missing)} is not installed;"
            f" `pip install 'lowrank-dse[{extra}]'`"
        )
    if not loaded.model.can_generate() or loaded.model.config.is_encoder_decoder:
        raise ExportError(
            f"an export to {title} needs a decoder that generates text, but the model is a"
            f" {type(loaded.model).__name__}; use `--format transformers`"
        )


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs of one step after a short prompt: two sequences, three new tokens, four cached ones.

    The cache keeps all tokens of every layer, also of those with a sliding window, whose mask hides the others.
    No size is 0 or 1, which tracing would take as constant.

    Raises:
        ExportError: The model has no key-value cache of keys and values alone.
    """
    vocabulary = model.config.get_text_config().vocab_size
    length = _CACHED_TOKENS + _NEW_TOKENS
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (_BATCH, length), generator=generator).to(model.device)
    cache = DynamicCache()
    with torch.no_grad():
        try:
            output = model(input_ids=tokens[:, :_CACHED_TOKENS], past_key_values=cache, use_cache=True)
        except (TypeError, ValueError, AttributeError) as error:
            raise _no_cache(model) from error
    layers = getattr(output.get("past_key_values"), "layers", None)
    if not layers or any(not isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise _no_cache(model)
    positions = torch.arange(_CACHED_TOKENS, length, device=model.device)[None].expand(_BATCH, _NEW_TOKENS)
    return {
        "input_ids": tokens[:, _CACHED_TOKENS:].contiguous(),
        "attention_mask": torch.ones_like(tokens),
        "position_ids": positions.contiguous(),
        "past_key_values": output["past_key_values"],
        "use_cache": True,
    }


def dynamic_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """The axes of `example_inputs` that vary: batch, new tokens and cached tokens; all others are constants."""
    vary = torch.export.Dim.AUTO
    tokens, cached = {0: vary, 1: vary}, {0: vary, 2: vary}
    leaves = 2 * len(inputs["past_key_values"].layers)
    caches = {"past_key_values": [cached] * leaves}
    return {name: tokens for name, value in inputs.items() if isinstance(value, Tensor)} | caches


def _no_cache(model: PreTrainedModel) -> ExportError:
    return ExportError(
        f"a graph needs a key-value cache in every layer, but {type(model).__name__} has none at this point; use"
        f" `--format transformers`"
    )


def port_names(names: Sequence[str], cache: str) -> list[str]:
    """The names that Optimum reads: `<cache>.N.key` and `<cache>.N.value` for caches, others unchanged.

    Args:
        names: The exporter's names, such as `input.past_key_values.layers.3.keys`.
        cache: `past_key_values` for inputs, `present` for outputs.
    """
    matches = [_CACHE_PORT.fullmatch(name) for name in names]
    layers = list(dict.fromkeys(match[1] for match in matches if match))  # layers without attention have no cache
    return [
        f"{cache}.{layers.index(match[1])}.{_PARTS[match[2]]}" if match else name
        for name, match in zip(names, matches, strict=True)
    ]


def write_graph_config(model: PreTrainedModel, inputs: dict[str, Any], folder: Path) -> None:
    """Write config.json: the base model's, with as many layers as there are caches, which is what runtimes read."""
    layers = inputs["past_key_values"].layers
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(layers)]
    found = config.to_diff_dict()
    found.pop("quantization_config", None)
    found |= {
        "architectures": [type(model).__name__],
        "model_type": type(model.config).model_type,
        "vocab_size": config.get_text_config().vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def tracing_errors(title: str) -> Iterator[None]:
    """Turn whatever a tracer raises into one line.

    Raises:
        ExportError: The block failed.
    """
    try:
        yield
    except (ExportError, OSError, KeyboardInterrupt, MemoryError):
        raise
    except ImportError as error:
        raise ExportError(
            f"an export to {title} needs a transformers with `transformers.exporters` (5.23), but: {error}"
        ) from error
    except Exception as error:  # the tracers of torch and of the runtimes have no common base class
        text = " ".join(str(error).split())
        raise ExportError(
            f"the model must be traceable for an export to {title}, but: {type(error).__name__}: {text[:300]}; use"
            f" `--format transformers` or `--format dense`"
        ) from error


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Hide what the tracers print and warn: it concerns their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
