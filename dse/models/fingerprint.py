"""The fingerprint of a model: its config and every byte of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel

from dse.models.checkpoint import Checkpoint

__all__ = ["model_fingerprint"]

_CHUNK_BYTES = 8 * 2**20

# The origin of the model, the program that wrote it, and the way it is run do not change what the weights compute.
_IGNORED_CONFIG_KEYS = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map"}
    | {"dtype", "torch_dtype", "quantization_config"}
    | {"use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
    | {"_attn_implementation", "_attn_implementation_internal", "_experts_implementation"}
)


def model_fingerprint(model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> str:
    """Sixteen hexadecimal digits that change when a weight, a persistent buffer or the architecture changes.

    Independent of the device, the file format and the number of threads; tied weights are read once. Tensors are copied
    to the CPU one chunk at a time, so a model on a GPU needs no second copy.

    Args:
        model: Any Hugging Face model.
        checkpoint: The files that hold its weights, if they are not in memory; read one by one.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED_CONFIG_KEYS}
    whole = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    tensors = dict(_named_tensors(model))
    source = tensors.items() if checkpoint is None else checkpoint.read(tensors)
    # sha256 releases the GIL on large inputs, so threads use several cores.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for name, tensor in source:
            whole.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
            for digest in pool.map(_digest, _chunks(tensor)):
                whole.update(digest)
    return whole.hexdigest()[:16]


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()  # torch names a shared parameter once
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def _chunks(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat, size = tensor.detach().reshape(-1), max(1, _CHUNK_BYTES // tensor.element_size())
    return [flat[start : start + size] for start in range(0, flat.numel(), size)]


def _digest(chunk: torch.Tensor) -> bytes:
    bytes_view: Any = chunk.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(bytes_view).digest()
