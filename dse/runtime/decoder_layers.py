"""Decoder layers that the kernel can run as a whole, all layers of a model in one call.

A layer is served where its class is known and its products have the kernel's form; what the model then gives is
compared with what it gave, as for all forms. Anything else runs as it did: other families, other caches, masks that
hide more than the future, batches too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dse.kernel import AttentionParts, KernelChains, KernelForward, KernelLayer, LayerRun, MlpParts, NormParts
from dse.runtime.products import SharedLinear

__all__ = ["kernel_forwards", "kernel_layer", "pass_outputs"]

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Layers of `transformers` that compute what `dse/kernel/layer.h` does; known by name, and each is tried."""


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
    norm = attention.norm if attention is not None else mlp.norm if mlp is not None else None
    return None if norm is None else KernelLayer(attention, mlp, norm.weight.shape[0])


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


def kernel_forwards(model: nn.Module, *, at_once: bool) -> list[KernelForward]:
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
                found += _forwards_of(run)
                run = []
    return found


def _forwards_of(run: Sequence[tuple[nn.Module, KernelLayer]]) -> list[KernelForward]:
    whole = LayerRun(
        [known for _, known in run], [_attention_slot(layer) for layer, known in run if known.has_attention]
    )
    return [KernelForward(layer, whole, is_first=i == 0) for i, (layer, _) in enumerate(run)]


def _attention_slot(layer: Any) -> int:
    return int(layer.self_attn.layer_idx)


@torch.inference_mode()
def pass_outputs(model: Any, tokens: Tensor) -> Tensor:
    """Logits of `tokens` (batch, tokens): of all but the last as a prompt, of that as a decode step after it."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 1)  # one place stays empty, and masked
    model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)  # a cache allocates itself in its first pass
    cache.reset()  # type: ignore[no-untyped-call]
    prompt = model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True).logits
    mask = torch.zeros(tokens.shape[0], 1, 1, tokens.shape[1] + 1, dtype=model.dtype, device=tokens.device)
    mask[..., -1] = torch.finfo(model.dtype).min
    position = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)
    output = model(
        input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=position
    )
    return torch.cat([prompt, output.logits], dim=1)
