"""Decoder layers whose decode steps run as one call of the kernel, all layers of a model together.

A layer is served where its class is known, its products have the kernel's form, and its step, run beside the layer's
own on random numbers, gives the same. Anything else runs as it did: prefill, other caches, batches too large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dse.kernel import AttentionParts, CacheSlot, KernelChains, KernelLayer, MlpParts, NormParts, run_layers, takes_step
from dse.runtime.products import SharedLinear

__all__ = ["LayerRun", "SteppedForward", "kernel_layer", "step_output", "stepped_layers"]

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Layers of `transformers` that compute what `dse/kernel/layer.h` does; known by name, and each is tried."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRun:
    """The layers of one model that run as one call.

    Attributes:
        layers: In order.
        slots: Of each layer that has attention the number of its place in the cache.
    """

    layers: Sequence[KernelLayer]
    slots: Sequence[int]


class SteppedForward:
    """Stands in for the `forward` of a decoder layer: decode steps over a static cache are the kernel's.

    The first of a run computes for all of them, and the others hand on what they are given: whether a step is for the
    kernel depends on nothing that changes from layer to layer.

    Args:
        layer: The layer, for all but decode steps.
        run: All layers of its run.
        is_first: Whether it is the one that computes.
    """

    def __init__(self, layer: nn.Module, run: LayerRun, *, is_first: bool) -> None:
        self.layer = layer
        self.run = run
        self._is_first = is_first

    def __call__(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """Map (batch, tokens, width) to the same."""
        plain = type(self.layer).forward
        mask, angles = _additive(keywords.get("attention_mask"), hidden_states), keywords.get("position_embeddings")
        if arguments or angles is None or not takes_step(hidden_states, mask):
            return plain(self.layer, hidden_states, *arguments, **keywords)
        slots = _slots(keywords.get("past_key_values"), self.run.slots)
        if slots is None:
            return plain(self.layer, hidden_states, **keywords)
        assert mask is not None  # noqa: S101 - takes_step
        return run_layers(self.run.layers, hidden_states, angles, mask, slots) if self._is_first else hidden_states


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
            return None
        found.append(CacheSlot(layer.keys, layer.values, layer.cumulative_length))
    return found


def kernel_layer(layer: nn.Module) -> KernelLayer | None:
    """The layer as the kernel knows it; None where it cannot be.

    Args:
        layer: Of a model whose forms are in place, so that its products have the kernel's form.
    """
    if "forward" in vars(layer):  # somebody else's already
        return None
    name = type(layer).__name__
    if name not in {f"{family}DecoderLayer" for family in _FAMILIES} or layer.training:
        return None
    try:
        attention, mlp = _attention(layer), _mlp(layer)
    except _UnknownError:
        return None
    width = _norm(layer.input_layernorm if attention else layer.post_attention_layernorm).weight.shape[0]
    return KernelLayer(attention, mlp, width)


class _UnknownError(Exception):
    """A part is not what the kernel computes; never leaves this module."""


def _attention(layer: Any) -> AttentionParts | None:
    block = layer.self_attn
    if type(block).__name__ == "RemovedBlock":
        return None
    if getattr(block, "sliding_window", None) is not None:
        raise _UnknownError
    inputs, (query_at, key_at, value_at) = _shared(block.q_proj, block.k_proj, block.v_proj)
    output, _ = _shared(block.o_proj)
    norms = [getattr(block, name, None) for name in ("q_norm", "k_norm")]
    norm = _norm(layer.input_layernorm)
    head_norms = None
    if norms != [None, None]:
        query_norm, key_norm = (_norm(norm) for norm in norms)
        if {query_norm.epsilon, key_norm.epsilon} != {norm.epsilon}:
            raise _UnknownError
        head_norms = (query_norm.weight, key_norm.weight)
    sizes = [linear.shared.sizes[linear.index] // block.head_dim for linear in (block.q_proj, block.k_proj)]
    return AttentionParts(
        norm,
        inputs,
        output,
        query_at,
        key_at,
        value_at,
        query_heads=sizes[0],
        heads=sizes[1],
        head_size=block.head_dim,
        scaling=block.scaling,
        head_norms=head_norms,
    )


def _mlp(layer: Any) -> MlpParts | None:
    block = layer.mlp
    if type(block).__name__ == "RemovedBlock":
        return None
    if type(block.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise _UnknownError
    inputs, (gate_at, up_at) = _shared(block.gate_proj, block.up_proj)
    output, _ = _shared(block.down_proj)
    width = block.gate_proj.shared.sizes[block.gate_proj.index]
    return MlpParts(_norm(layer.post_attention_layernorm), inputs, output, gate_at, up_at, width)


def _norm(norm: Any) -> NormParts:
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float) or weight.dtype != torch.float32:
        raise _UnknownError
    return NormParts(weight.detach(), epsilon)


def _shared(*linears: Any) -> tuple[KernelChains, list[int]]:
    """The products of modules that share their input, and where in its results each one's lie."""
    shared = linears[0].shared if isinstance(linears[0], SharedLinear) else None
    if shared is None or shared.kernel is None:
        raise _UnknownError
    if any(not isinstance(linear, SharedLinear) or linear.shared is not shared for linear in linears):
        raise _UnknownError
    return shared.kernel, [sum(shared.sizes[: linear.index]) for linear in linears]


def stepped_layers(model: nn.Module, *, at_once: bool) -> list[SteppedForward]:
    """What can take the place of the `forward` of a model's layers.

    Args:
        model: In eval mode, its forms in place.
        at_once: Whether layers that follow each other are to run as one call: then what lies between them, which
            `output_hidden_states` asks for, is not to be had.
    """
    found = []
    for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        run: list[tuple[nn.Module, KernelLayer]] = []
        for layer in [*layers, nn.Identity()]:
            known = kernel_layer(layer)
            if known is not None:
                run.append((layer, known))
            if run and (not at_once or (known is None and type(layer).__name__ != "PassedLayer")):
                found += _stepped(run)
                run = []
    return found


def _stepped(run: Sequence[tuple[nn.Module, KernelLayer]]) -> list[SteppedForward]:
    whole = LayerRun(
        [known for _, known in run], [_attention_slot(layer) for layer, known in run if known.has_attention]
    )
    return [SteppedForward(layer, whole, is_first=i == 0) for i, (layer, _) in enumerate(run)]


def _attention_slot(layer: Any) -> int:
    return int(layer.self_attn.layer_idx)


@torch.inference_mode()
def step_output(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the last of `tokens` (batch, tokens), taken as a decode step over a static cache of the others."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 1)  # one place stays empty, and masked
    model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
    mask = torch.zeros(tokens.shape[0], 1, 1, tokens.shape[1] + 1, dtype=model.dtype, device=tokens.device)
    mask[..., -1] = torch.finfo(model.dtype).min
    position = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)
    output = model(
        input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=position
    )
    logits: Tensor = output.logits
    return logits
