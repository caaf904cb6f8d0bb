"""Decoder layers of a model that run as one call of the kernel, standing in for the layers' own `forward`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dse.kernel.layers import CacheSlot, KernelLayer, run_layers, takes_prompt, takes_step

__all__ = ["KernelForward", "LayerRun", "runs_in_kernel"]


@dataclasses.dataclass(eq=False)
class LayerRun:
    """The layers of one model that run as one call.

    Attributes:
        layers: In order.
        slots: Of each layer that has attention the number of its place in the cache.
        prompt: The mask of the prompt under way, and whether the kernel is for it.
    """

    layers: Sequence[KernelLayer]
    slots: Sequence[int]
    prompt: tuple[Tensor | None, bool] = (None, False)


class KernelForward:
    """Stands in for the `forward` of a decoder layer: over a static cache, prompts and decode steps are the kernel's.

    The first of a run computes for all of them, and the others hand on what they are given: whether a pass is for the
    kernel depends on nothing that changes from layer to layer.

    Args:
        layer: The layer, for all other passes.
        run: All layers of its run.
        is_first: Whether it is the one that computes.
    """

    def __init__(self, layer: nn.Module, run: LayerRun, *, is_first: bool) -> None:
        self.layer = layer
        self.run = run
        self._is_first = is_first

    def __call__(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """Map (batch, tokens, width) to the same."""
        mask, angles = _additive(keywords.get("attention_mask"), hidden_states), keywords.get("position_embeddings")
        slots = None if arguments or angles is None else _slots(keywords.get("past_key_values"), self.run.slots)
        if slots is not None and angles is not None:
            if takes_step(hidden_states, mask):
                return self._result(hidden_states, angles, mask, slots)
            if takes_prompt(hidden_states) and self._is_causal(keywords.get("attention_mask"), hidden_states, slots):
                return self._result(hidden_states, angles, None, slots)
        return type(self.layer).forward(self.layer, hidden_states, *arguments, **keywords)

    def _result(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, slots: Sequence[CacheSlot]
    ) -> Tensor:
        return run_layers(self.run.layers, hidden, angles, mask, slots) if self._is_first else hidden

    def _is_causal(self, mask: Tensor | None, hidden: Tensor, slots: Sequence[CacheSlot]) -> bool:
        """Whether this is a prompt without padding at the begin of its cache; the first of a run finds out for all."""
        if self._is_first:
            self.run.prompt = (mask, _is_whole_prompt(mask, hidden, slots))
        seen, found = self.run.prompt
        return found and seen is mask


def _is_whole_prompt(mask: Tensor | None, hidden: Tensor, slots: Sequence[CacheSlot]) -> bool:
    if torch.compiler.is_compiling() or any(int(slot.length) for slot in slots):
        return False  # what the mask says must be looked at, and a program is traced for any mask
    if any(slot.keys.shape[2] < hidden.shape[1] or slot.keys.shape[0] != hidden.shape[0] for slot in slots):
        return False
    if mask is None:
        return True
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != hidden.shape[1]:
        return False
    rows = torch.arange(mask.shape[2])[:, None]
    is_seen = mask if mask.dtype == torch.bool else mask == 0
    is_hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    expected = (torch.arange(mask.shape[3]) <= rows).expand(mask.shape)
    return bool(torch.equal(is_seen, expected) and torch.equal(is_hidden, ~expected))


def _additive(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool or hidden.shape[1] != 1:
        return mask
    return torch.where(mask, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)


def _slots(cache: Any, numbers: Sequence[int]) -> list[CacheSlot] | None:
    """The places of a static cache; None where it is of another kind or not filled yet."""
    layers: Sequence[Any] = getattr(cache, "layers", ())
    found = []
    for number in numbers:
        if number >= len(layers):
            return None
        layer = layers[number]
        if type(layer).__name__ != "StaticLayer" or not layer.is_initialized:
            return None  # a cache allocates itself in its first pass
        found.append(CacheSlot(layer.keys, layer.values, layer.cumulative_length))
    return found


def runs_in_kernel(model: nn.Module) -> bool:
    """Whether layers of this model are the kernel's, as it is now."""
    return any(isinstance(vars(module).get("forward"), KernelForward) for module in model.modules())
