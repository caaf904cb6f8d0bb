"""Whole decoder layers as one call of the kernel."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dse.kernel.chains import FEW_ROWS, KernelChains
from dse.kernel.library import is_supported

__all__ = [
    "AttentionParts",
    "CacheSlot",
    "KernelLayer",
    "MlpParts",
    "NormParts",
    "run_layers",
    "takes_prompt",
    "takes_step",
]


@dataclass(frozen=True, eq=False)
class NormParts:
    """A root-mean-square norm.

    Attributes:
        weight: Shape (width,).
        epsilon: Added to the mean square.
    """

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """Softmax attention with rotary positions and a norm before it.

    Attributes:
        norm: Of the block's input.
        inputs: Query, key and value.
        output: What maps the heads back.
        query_at: Where a row of what `inputs` gives holds the query.
        key_at: The key.
        value_at: The value.
        query_heads: How many there are.
        heads: Of keys and values.
        head_size: Numbers of each.
        scaling: Factor of the scores.
        head_norms: Of each query and key head before rotation, with the epsilon of `norm`; None where there are none.
    """

    norm: NormParts
    inputs: KernelChains
    output: KernelChains
    query_at: int
    key_at: int
    value_at: int
    query_heads: int
    heads: int
    head_size: int
    scaling: float
    head_norms: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class MlpParts:
    """`down(silu(gate(x)) * up(x))` with a norm before it.

    Attributes:
        norm: Of the block's input.
        inputs: Gate and up.
        output: Down.
        gate_at: Where a row of what `inputs` gives holds the gate.
        up_at: What it is multiplied by.
        width: Numbers of each.
    """

    norm: NormParts
    inputs: KernelChains
    output: KernelChains
    gate_at: int
    up_at: int
    width: int


@dataclass(frozen=True, eq=False)
class CacheSlot:
    """Keys and values of one layer.

    Attributes:
        keys: Shape (batch, heads, positions, head size).
        values: The same.
        length: How many positions are filled, a tensor without dimensions.
    """

    keys: Tensor
    values: Tensor
    length: Tensor


class KernelLayer:
    """A decoder layer as the kernel knows it, from now until nobody holds this.

    Args:
        attention: Its first block; None where there is none.
        mlp: Its second block; None likewise.
        width: Of the residual stream.
    """

    def __init__(self, attention: AttentionParts | None, mlp: MlpParts | None, width: int) -> None:
        tensors, sizes, numbers = ([], [], []) if attention is None else _attention(attention)
        more, more_sizes, epsilon = ([], [], 0.0) if mlp is None else _mlp(mlp)
        self._parts = (attention, mlp, width)
        self.has_attention = attention is not None
        self.number: int = torch.ops.dse.new_layer(tensors, sizes, numbers, more, more_sizes, epsilon, width)
        weakref.finalize(self, torch.ops.dse.free_layer, self.number)

    def __deepcopy__(self, memo: dict[int, object]) -> KernelLayer:
        """One of its own, with the weights that a copied model has."""
        return KernelLayer(*copy.deepcopy(self._parts, memo))


def takes_step(hidden: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel is for this pass: one token of a few sequences, without gradients, with an additive mask."""
    is_few = hidden.ndim == 3 and hidden.shape[1] == 1 and 0 < hidden.shape[0] <= FEW_ROWS
    if not is_few or mask is None or not is_supported(hidden.device, hidden.dtype):
        return False
    is_recorded = torch.is_grad_enabled() and hidden.requires_grad
    is_mask = mask.dtype == hidden.dtype and mask.ndim == 4 and mask.shape[1:3] == (1, 1)
    return is_mask and mask.shape[0] in (1, hidden.shape[0]) and not is_recorded


def takes_prompt(hidden: Tensor) -> bool:
    """Whether the kernel is for this pass: several tokens of each sequence, without gradients."""
    is_recorded = torch.is_grad_enabled() and hidden.requires_grad
    is_prompt = hidden.ndim == 3 and hidden.shape[1] > 1 and hidden.shape[0] > 0
    return is_prompt and is_supported(hidden.device, hidden.dtype) and not is_recorded


def run_layers(
    layers: Sequence[KernelLayer],
    hidden: Tensor,
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    slots: Sequence[CacheSlot],
) -> Tensor:
    """Run layers one after the other, for one new token of each sequence or for whole prompts; they join the caches.

    Args:
        layers: In order.
        hidden: Shape (batch, tokens, width).
        angles: Cosines and sines of the positions, each (batch or 1, tokens, head size).
        mask: For one token what is added to its scores, (batch or 1, 1, 1, positions); what lies behind it is not
            looked at. None for prompts, which begin with empty caches and whose tokens attend to none behind them.
        slots: Of each layer that has attention; changed in place.

    Returns:
        Shape (batch, tokens, width).
    """
    keys, values = [slot.keys for slot in slots], [slot.values for slot in slots]
    lengths, numbers = [slot.length for slot in slots], [layer.number for layer in layers]
    found: Tensor
    if mask is None:
        found = torch.ops.dse.prefill_layers(hidden, *angles, keys, values, lengths, numbers)
    else:
        found = torch.ops.dse.decoder_layers(hidden, *angles, mask, keys, values, lengths, numbers)
    return found


def _attention(a: AttentionParts) -> tuple[list[Tensor], list[int], list[float]]:
    tensors = [a.norm.weight, a.inputs.weights, a.inputs.layout, a.output.weights, a.output.layout]
    sizes = [a.inputs.out_features, a.inputs.scratch, a.output.scratch]
    sizes += [a.query_at, a.key_at, a.value_at, a.query_heads, a.heads, a.head_size]
    sizes += [a.inputs.many_number, a.output.many_number]
    return [*tensors, *(a.head_norms or ())], sizes, [a.norm.epsilon, a.scaling]


def _mlp(m: MlpParts) -> tuple[list[Tensor], list[int], float]:
    tensors = [m.norm.weight, m.inputs.weights, m.inputs.layout, m.output.weights, m.output.layout]
    sizes = [m.inputs.out_features, m.inputs.scratch, m.output.scratch, m.gate_at, m.up_at, m.width]
    sizes += [m.inputs.many_number, m.output.many_number]
    return tensors, sizes, m.norm.epsilon
