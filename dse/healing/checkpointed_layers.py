"""Compute layers again in the backward pass instead of keeping their activations (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint

from dse.models import LoadedModel
from dse.models.layer_paths import layer_modules

__all__ = ["checkpointed_layers"]


@contextmanager
def checkpointed_layers(loaded: LoadedModel, *, is_on: bool) -> Iterator[None]:
    """Checkpoint every layer of the model within the block; nothing if `is_on` is false.

    Transformers' own way works in training mode only, which would turn dropout on.
    """
    layers = layer_modules(loaded.model, loaded.topology) if is_on else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
