"""Attention of one new token over a key-value cache of fixed size, without repeating the cache for each query head.

Heads that share a key and value head (grouped-query attention) become rows of one product with it. `transformers` does
so too, but not while `torch.compile` traces it: there it copies the whole cache for every query head in every step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dse.kernel import NO_KERNEL, attend, can_attend, kernel_name

__all__ = ["GROUPED_ATTENTION", "grouped_attention", "grouped_attention_in_use"]

GROUPED_ATTENTION = "dse_grouped"
"""The name under which `transformers` finds it."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    kernel: bool = False,
    **more: Any,
) -> tuple[Tensor, None]:
    """Softmax attention for one query token; anything else goes to `transformers`' own SDPA form.

    Args:
        module: The attention module, which may name its `num_key_value_groups`.
        query: Shape (batch, query heads, tokens, head size).
        key: Shape (batch, key heads, cached tokens, head size).
        value: Shape (batch, key heads, cached tokens, head size of values).
        attention_mask: Additive, broadcastable to (batch, 1, tokens, cached tokens).
        dropout: Not applied to one token: models that are measured are in eval mode.
        scaling: Factor of the products; None for the inverse root of the head size.
        kernel: Whether the CPU kernel is there to be used.
        more: Whatever else the model hands to its attention.

    Returns:
        Outputs of shape (batch, tokens, query heads, head size of values), and None for the weights.
    """
    plain = {name: given for name, given in more.items() if given is not None}
    is_understood = plain.keys() <= {"position_ids", "use_cache", "cache_position", "logits_to_keep"}
    if query.shape[2] != 1 or attention_mask is None or attention_mask.shape[1] != 1 or not is_understood:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    batch, heads, _, size = query.shape
    if kernel and can_attend(query, key, value, attention_mask):
        return attend(query, key, value, attention_mask, size**-0.5 if scaling is None else scaling), None
    groups = batch * key.shape[1]
    rows = query.reshape(groups, batch * heads // groups, size) * (size**-0.5 if scaling is None else scaling)
    scores = torch.bmm(rows, key.reshape(groups, -1, size).transpose(1, 2)).view(batch, key.shape[1], -1, key.shape[2])
    weights = torch.softmax((scores + attention_mask).float(), dim=-1).to(query.dtype)
    mixed = torch.bmm(weights.view(groups, -1, key.shape[2]), value.reshape(groups, -1, value.shape[3]))
    return mixed.view(batch, 1, heads, value.shape[3]), None


@contextlib.contextmanager
def grouped_attention_in_use(model: nn.Module) -> Iterator[None]:
    """Let a model that asks for `sdpa` attend so within the block; models that ask for anything else are left alone."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    first = next(model.parameters())
    kernel = kernel_name(first.device, first.dtype) != NO_KERNEL
    AttentionInterface.register(GROUPED_ATTENTION, functools.partial(grouped_attention, kernel=kernel))
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
