"""Attention of one new token over a cache as one call of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dse.kernel.library import is_supported

__all__ = ["attend", "can_attend"]


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether the kernel, where there is one, is for these: one token each, and a mask for all heads alike."""
    given = (query, key, value, mask)
    is_recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    is_known = all(is_supported(tensor.device, tensor.dtype) and tensor.ndim == 4 for tensor in given)
    return is_known and not is_recorded and query.shape[2] == 1 and mask.shape[1:3] == (1, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Softmax attention of one token over a cache.

    Args:
        query: Shape (batch, query heads, 1, head size).
        key: Shape (batch, key heads, positions, head size); query heads in order share a key head.
        value: Shape (batch, key heads, positions, head size of values).
        mask: Added to the scores, (batch or 1, 1, 1, positions).
        scaling: Factor of the products.

    Returns:
        Shape (batch, 1, query heads, head size of values).
    """
    mask = mask.expand(query.shape[0], 1, 1, key.shape[2])
    found: Tensor = torch.ops.dse.attend(query, key.contiguous(), value.contiguous(), mask, scaling)
    return found
