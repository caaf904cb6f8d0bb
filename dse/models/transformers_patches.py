"""Context managers that patch transformers while a model loads, and helpers for weights that come from GGUF files."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as gguf_module
from transformers.utils import logging as transformers_logging
from transformers.utils import quantization_config

__all__ = ["dense_weights_keywords", "drop_quantization", "quiet_transformers", "shared_gguf_reader"]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the log messages, warnings and loading bars of transformers inside the block.

    Download bars of the hub stay: a download takes long enough to need one, reading local weights does not.
    """
    level = transformers_logging.get_verbosity()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    # The GGUF reader imports tqdm itself, so the hook does not reach it.
    gguf_bar = vars(gguf_module)["tqdm"]
    try:
        transformers_logging.set_verbosity(logging.CRITICAL)
        hub_logger.setLevel(logging.CRITICAL)
        vars(gguf_module)["tqdm"] = functools.partial(gguf_bar, disable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        vars(gguf_module)["tqdm"] = gguf_bar
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(level)
        hub_logger.setLevel(hub_level)


class _PlainArrayReader(gguf.GGUFReader):  # type: ignore[misc]
    """A GGUF reader that is three times as fast: it slices the file as a plain array, without numpy's memmap checks."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap[Any, Any]) -> None:
        self._data = mapped.view(np.ndarray)


@contextlib.contextmanager
def shared_gguf_reader() -> Iterator[None]:
    """Parse a GGUF file once for config, weights and tokenizer inside the block.

    transformers opens the file for each of them, and parsing a vocabulary of 49 k tokens takes seconds each time; it
    also rebuilds the map of tensor names for every module. Both are pure functions of their arguments. With the plain
    array this loads SmolLM2-135M in 4 s of CPU time instead of 20 s.
    """
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(_PlainArrayReader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def dense_weights_keywords() -> dict[str, Any]:
    """Keyword arguments that make `from_pretrained` unpack every weight, whichever kernels are installed."""
    config = getattr(quantization_config, "GgufConfig", None)  # older versions lack the class and always unpack
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def drop_quantization(model: PreTrainedModel) -> None:
    """Remove the GGUF quantization config: the weights are plain floats, but `save_pretrained` would refuse them."""
    names: list[tuple[object, str]] = [(model.config, "quantization_config")]
    names += [(model, name) for name in ("hf_quantizer", "quantization_method", "is_quantized")]
    for owner, name in names:
        if name in vars(owner):
            delattr(owner, name)
