"""Read single weights from the safetensors files of a checkpoint, and build a model whose weights stay there.

A model of 70 billion parameters does not fit the memory of one device. Work that goes through it layer by layer (the
factor bank) needs the weights of one layer at a time, so the model is built without weights, and the weights of a
module are read when it is reached and released afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dse.models.model_source import ModelSource

__all__ = ["Checkpoint", "model_without_weights", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where each weight of a model is stored.

    Attributes:
        places: Name of a parameter or persistent buffer in the model to its file and its name in that file.
        dtypes: Name of a weight to its dtype in the model, to which it is converted when it is read.
    """

    places: Mapping[str, tuple[Path, str]]
    dtypes: Mapping[str, torch.dtype]

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight) one by one, in the dtype of the model, in an own memory block on `device`.

        A file is opened for each weight and closed after it: all pages that were read of an open file would count as
        memory of this process.
        """
        for name in names:
            path, key = self.places[name]
            with safe_open(path, framework="pt") as file:
                stored = file.get_tensor(key)
            weight = stored.to(device, self.dtypes[name])
            if weight is stored:  # a view of the mapped file
                weight = stored.clone()
            del stored
            yield name, weight

    @contextmanager
    def present(
        self, model: nn.Module, paths: Iterable[str], device: torch.device | str, *, without: Sequence[str] = ()
    ) -> Iterator[None]:
        """Put the weights of these modules into `model` for the duration of a `with` block.

        Args:
            model: The model that `model_without_weights` built.
            paths: Paths of modules; their submodules are included.
            device: Where the weights are put.
            without: Paths of modules inside them that stay without weights.
        """
        missing = _without_weights(model, paths, self.places, without)
        try:
            for name, weight in self.read(missing, device):
                table, attribute, empty = missing[name]
                is_parameter = isinstance(empty, nn.Parameter)
                table[attribute] = nn.Parameter(weight, requires_grad=False) if is_parameter else weight
            yield
        finally:
            for table, attribute, empty in missing.values():
                table[attribute] = empty

    def load(self, model: nn.Module, place: Callable[[str], torch.device]) -> None:
        """Put every weight into `model`, where it stays, on the device `place(name)`; tied weights stay tied."""
        loaded: dict[int, Tensor] = {}
        missing = _without_weights(model, [""], self.places)
        for name, (table, attribute, empty) in missing.items():
            if id(empty) not in loaded:
                weight = next(self.read([name], place(name)))[1]
                is_parameter = isinstance(empty, nn.Parameter)
                loaded[id(empty)] = nn.Parameter(weight, requires_grad=False) if is_parameter else weight
            table[attribute] = loaded[id(empty)]


def _without_weights(
    model: nn.Module, paths: Iterable[str], places: Collection[str], without: Sequence[str] = ()
) -> dict[str, tuple[dict[str, Any], str, Tensor]]:
    """Weights on the meta device inside these modules: name to (table that holds it, key in the table, the weight).

    A persistent buffer is listed even if it has a value, which comes from the config and not from the checkpoint.
    """
    found: dict[str, tuple[dict[str, Any], str, Tensor]] = {}
    for path in paths:
        for inner, module in model.get_submodule(path).named_modules(prefix=path):
            if any(inner == left_out or inner.startswith(f"{left_out}.") for left_out in without):
                continue
            for table in (module._parameters, module._buffers):
                for attribute, tensor in table.items():
                    name = f"{inner}.{attribute}".lstrip(".")
                    if tensor is not None and name in places and (tensor.is_meta or table is module._buffers):
                        found[name] = (table, attribute, tensor)
    return found


def model_without_weights(factory: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters are on the meta device, while its buffers (rotary frequencies, masks) are computed.

    Args:
        factory: Model class, or auto class.
        config: The checkpoint's config.
        dtype: Dtype of the parameters.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        if issubclass(factory, PreTrainedModel):
            model = factory._from_config(config, dtype=dtype)
        else:
            model = factory.from_config(config, dtype=dtype)
    model.tie_weights()
    model.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def open_checkpoint(source: ModelSource, model: PreTrainedModel, dtype: torch.dtype) -> Checkpoint | None:
    """Find every weight of `model` in the files of a checkpoint.

    Args:
        source: The checkpoint.
        model: The model without weights.
        dtype: Dtype of its weights.

    Returns:
        None if the weights cannot be read one by one: GGUF, a layout that transformers converts while it loads (such
        as experts in separate tensors), or weights that are kept in another dtype.
    """
    if source.gguf_file is not None:
        return None
    if dtype != torch.float32 and any(getattr(model, f"_keep_in_fp32_modules{s}", None) for s in ("", "_strict")):
        return None
    names = _weight_names(model)
    renamed = _names_in_model(model, _stored_keys(source), names)
    state = model.state_dict()
    places = {}
    for name, aliases in names.items():
        found = next((renamed[alias] for alias in (name, *aliases) if alias in renamed), None)
        if found is None:
            return None
        places[name] = found
    shapes = _stored_shapes({path for path, _ in places.values()})
    if any(shapes[place] != tuple(state[name].shape) for name, place in places.items()):
        return None
    return Checkpoint(places, {name: state[name].dtype for name in places})


def _weight_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every name of a parameter or persistent buffer to the other names of the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    persistent = set(model.state_dict())
    for source in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in source:
            if name in persistent:
                by_tensor.setdefault(id(tensor), []).append(name)
    return {name: [n for n in names if n != name] for names in by_tensor.values() for name in names}


def _stored_keys(source: ModelSource) -> dict[str, tuple[Path, str]]:
    """Key to file and key, for every tensor in the checkpoint's files."""
    index = source.file(_INDEX)
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [_SINGLE]
    found: dict[str, tuple[Path, str]] = {}
    for name in names:
        path = source.file(name)
        if path is not None:
            with safe_open(path, framework="pt") as file:
                found |= {key: (path, key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def _names_in_model(
    model: PreTrainedModel, places: Mapping[str, tuple[Path, str]], names: Mapping[str, Any]
) -> dict[str, tuple[Path, str]]:
    """The model's names of the stored weights, by transformers' own rules, without those that are converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[Path, str]] = {}
    for key, place in places.items():
        name, converted_by = rename_source_key(key, renamings, converters, prefix, state)
        if name not in names and key in names:
            name, converted_by = rename_source_key(key, [], [], prefix, state)
        if converted_by is None and name in names:
            found[name] = place
    return found


def _stored_shapes(paths: Iterable[Path]) -> dict[tuple[Path, str], tuple[int, ...]]:
    shapes: dict[tuple[Path, str], tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            shapes |= {(path, key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes
