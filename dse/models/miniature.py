"""The first layers of a model with random weights, made from its config: what timings and memory forecasts run on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dse.errors import ModelError
from dse.models.heads import Head, model_factory
from dse.models.load import DTYPES, LoadedModel, _config, _device, _load_errors, _tokenizer
from dse.models.model_source import resolve
from dse.models.model_topology import topology_of
from dse.models.transformers_patches import quiet_transformers

__all__ = ["first_layers"]


def first_layers(
    ref: str,
    layers: int,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    role_names: Mapping[str, str] | None = None,
    head: Head | None = None,
) -> LoadedModel:
    """A model of the first layers of `ref`, with its embeddings, head and tokenizer, and with random weights.

    No weight is read or downloaded, so the whole model may be larger than the memory of this machine.

    Args:
        ref: As in `load_model`.
        layers: Number of layers, at least 1.
        revision: As in `load_model`, like all further arguments.

    Raises:
        ModelError: The config cannot be read, or the architecture cannot be built with fewer layers.
    """
    source = resolve(ref, revision)
    with quiet_transformers():
        config = _shortened(_config(ref, source, trust_remote_code), layers)
        factory = model_factory(config, trust_remote_code, head)
        with _load_errors(ref), torch.device(_device(device)):
            if issubclass(factory, PreTrainedModel):
                model = factory._from_config(config, dtype=DTYPES[dtype])
            else:
                model = factory.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        tokenizer = _tokenizer(ref, source, trust_remote_code)
    model.eval()
    model.requires_grad_(False)
    topology = topology_of(model, role_names)
    if topology.layer_count != layers:
        raise ModelError(
            f"a forecast needs a model of {layers} layers from the config of '{ref}', but its class makes"
            f" {topology.layer_count}; forecasts do not support this architecture"
        )
    return LoadedModel(ref, revision, model, tokenizer, topology, _device(device), DTYPES[dtype])


def _shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of the config with fewer layers; lists with one entry per layer are cut."""
    short = copy.deepcopy(config)
    text: Any = short.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return short
