"""Write weights as safetensors: shared weights once, large models in shards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from dse.errors import StorageFullError
from dse.files import disk_errors

__all__ = ["MAX_SHARD_SIZE", "model_bytes", "stored_names", "write_weights", "writing_errors"]

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

MAX_SHARD_SIZE = "2GB"
"""Small enough for the memory of a laptop when the model is on a GPU."""


def stored_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names under which the model's weights are stored; a shared weight only under the name that loading expects."""
    persistent = set(model.state_dict())
    names_of: dict[int, list[str]] = {}
    for source in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in source:
            if name in persistent:
                names_of.setdefault(id(tensor), []).append(name)
    ignored = set(model._keys_to_ignore_on_save or ())
    derived = set(model.all_tied_weights_keys)
    kept: set[str] = set()
    for names in names_of.values():
        # If the config does not declare the sharing, keep every name: loading would not tie them again.
        kept.update([name for name in names if name not in derived] or names[:1])
    return tuple(name for name in model.state_dict() if name in kept and name not in ignored)


def model_bytes(model: PreTrainedModel) -> int:
    """Size of the model's stored weights, without file headers."""
    state = model.state_dict()
    return sum(state[name].numel() * state[name].element_size() for name in stored_names(model))


def write_weights(
    model: PreTrainedModel,
    folder: Path,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    renamed: Callable[[str], str] = str,
) -> None:
    """Write the current weights of `model` to `model.safetensors`, or to shards with an index.

    Weights are named after the modules, whatever their names were in the source file.

    Args:
        model: The model.
        folder: An existing folder.
        max_shard_size: Largest size of a file, such as "2GB".
        renamed: Name of a weight in the model to its name in the file.
    """
    state = model.state_dict()
    stored = {renamed(name): state[name] for name in stored_names(model)}
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file_name, names in split.filename_to_tensors.items():
        _save_one_by_one({name: stored[name] for name in names}, folder / file_name)
    if split.is_sharded:
        total = sum(tensor.numel() for tensor in stored.values())
        index = {"metadata": {"total_parameters": total, **split.metadata}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """Like `dse.files.disk_errors`, but also for safetensors, which wraps system errors in its own type.

    Raises:
        StorageFullError: The disk is full or the folder cannot be written.
    """
    try:
        with disk_errors(folder):
            yield
    except SafetensorError as error:
        text = str(error)
        if "os error 28" in text or "os error 122" in text or "No space left" in text:
            raise StorageFullError(
                f"there must be room on the disk that holds {folder}, but it is full; free some"
            ) from error
        raise


def _save_one_by_one(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file tensor by tensor: the only copy in memory is that of one tensor.

    `safetensors.torch.save_file` copies all tensors of a file before it writes the first.
    """
    # Wide numbers first, as safetensors itself sorts, so that every tensor is aligned in a mapped file.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            own = tensors[name].detach().cpu().contiguous()
            file.write(own.view(-1).view(torch.uint8).numpy().data)
