"""Pooling: from the hidden states of a text's tokens to one vector."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dse.errors import ModelError
from dse.models import LoadedModel
from dse.models.model_source import POOLING_FILE

__all__ = ["POOLINGS", "pooling_of"]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": lambda hidden, _: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(~mask.bool()[:, :, None], -torch.inf).amax(dim=1),
    "last_token": lambda hidden, mask: hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1],
}
"""Name to a function from hidden states (batch, tokens, width) and attention mask (batch, tokens), padded on the right,
to vectors (batch, width)."""

_SENTENCE_TRANSFORMERS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last_token",
}
_IGNORED_MODULES = ("Transformer", "Pooling", "Normalize")  # normalisation does not change a cosine


def pooling_of(loaded: LoadedModel) -> str:
    """The pooling that the model was trained with, from sentence-transformers' files; mean without such files.

    Raises:
        ModelError: The files require something unsupported: another pooling, several at once, or a layer after it.
    """
    modules = _read(loaded, "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _IGNORED_MODULES:
            raise ModelError(
                f"an embedding must be pooled hidden states, but '{loaded.ref}' adds a layer of type {kind}"
                f" (modules.json); choose a model without it"
            )
    pooling = _read(loaded, POOLING_FILE)
    if not isinstance(pooling, dict):
        return "mean"
    if isinstance(pooling.get("pooling_mode"), str):  # the format of newer versions
        mode = str(pooling["pooling_mode"])
        chosen = ["last_token" if mode == "lasttoken" else mode]
    else:
        chosen = [
            str(_SENTENCE_TRANSFORMERS.get(key, key))
            for key, value in pooling.items()
            if key.startswith("pooling_mode_") and value is True
        ]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ModelError(
            f"the pooling must be one of {', '.join(POOLINGS)}, but {POOLING_FILE} of '{loaded.ref}' has"
            f" {', '.join(chosen) or 'none'}; set one in the task (`pooling: mean`)"
        )
    return chosen[0]


def _read(loaded: LoadedModel, name: str) -> Any:
    text = loaded.sentence_files.get(name)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ModelError(f"{name} of '{loaded.ref}' must be JSON, but is not; restore or remove it") from error
