"""KL divergence and log-likelihood from hidden states, with one pass of the output head over the changed ones alone.

With logits z = W h + b, the dense probabilities p and the mean row e = W^T p that they attend to,

    KL(p || q) = sum_v p_v (z_v - z'_v) + lse(z') - lse(z) = e . (h - h') + lse(z') - lse(z),

since what `b` adds cancels. So the dense model leaves h, e and lse(z) behind - a few KB a token - in place of its
probabilities (200 KB a token with 49,152 words), and an option costs one product with W, whose logits are summed a
slice of the vocabulary at a time and never kept. Being a difference of differences it is exact for small changes too.

Heads that bend their logits afterwards (soft-capping) have no such row; for them both distributions are formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dse.evaluation.divergence import check_head, kl_divergence_of_logits
from dse.evaluation.scoring import TargetHead

__all__ = ["HeadDivergence", "WindowDamage", "head_divergence"]

_SLICE_BYTES = 16 * 2**20
"""Of logits on a CPU: what a last-level cache holds."""
_SLICE_BYTES_DEVICE = 2**29


@dataclass(frozen=True, eq=False)
class WindowDamage:
    """What a change of the model does on some windows, nats per token, each array of shape (windows,).

    Attributes:
        kl_divergence: KL(dense || changed), mean over a window's positions.
        log_likelihood_drop: Mean log-likelihood of the window's next tokens, dense minus changed.
    """

    kl_divergence: NDArray[np.float64]
    log_likelihood_drop: NDArray[np.float64]


class HeadDivergence(ABC):
    """What the dense model said about one batch of windows, to be compared with what a changed one says."""

    @abstractmethod
    def measure(self, hidden: Tensor) -> WindowDamage:
        """Compare the states of a changed model, shape (windows, tokens, width)."""


def head_divergence(model: PreTrainedModel, dense: Sequence[Tensor], batches: Sequence[Tensor]) -> list[HeadDivergence]:
    """One for each batch, by the cheapest way that gives what the model's own head does.

    Args:
        model: Its output head is never decomposed.
        dense: Hidden states of the dense model, each of shape (windows, tokens, width).
        batches: Token ids, each of shape (windows, tokens).

    Raises:
        ModelError: The model has no output head, or its logits are not its head's.
    """
    check_head(model, batches[0][:1])
    head = TargetHead(model)
    make = _LinearHead if head.is_linear else _AnyHead
    return [make(head, h, ids) for h, ids in zip(dense, batches, strict=True)]


class _LinearHead(HeadDivergence):
    """The expected row of the head in place of the probabilities; see the module's text."""

    def __init__(self, head: TargetHead, dense: Tensor, token_ids: Tensor) -> None:
        self._head = head.module
        self._tokens = token_ids.to(dense.device)
        self._dense = dense.float()
        flat = self._dense.flatten(0, 1)
        self._log_sum = self._log_sum_of(flat)
        self._expected = torch.zeros_like(flat)
        with torch.inference_mode():
            for weight, logits in self._slices(flat):
                self._expected.addmm_(torch.exp(logits - self._log_sum[:, None].to(logits.dtype)), weight)

    def measure(self, hidden: Tensor) -> WindowDamage:
        """See `HeadDivergence.measure`."""
        with torch.inference_mode():
            change = (self._dense - hidden.float()).flatten(0, 1)
            shift = self._log_sum_of(hidden.float().flatten(0, 1)) - self._log_sum
            divergence = _row_products(self._expected, change) + shift
            # The word that follows: its own row in place of the expected one.
            shape = self._tokens.shape
            followed = self._head.weight[self._tokens.roll(-1, dims=1).flatten()].float()
            drop = (_row_products(followed, change) + shift).reshape(shape)[:, :-1]
            return _divergence(divergence.reshape(shape).clamp(min=0.0), drop)

    def _log_sum_of(self, flat: Tensor) -> Tensor:
        """Log of the sum of exponentials of the logits, shape (positions,), float64."""
        with torch.inference_mode():
            parts = [torch.logsumexp(logits, dim=1) for _, logits in self._slices(flat)]
            return torch.logsumexp(torch.stack(parts, dim=1).double(), dim=1)

    def _slices(self, flat: Tensor) -> Any:
        """(rows of the head, logits) of a slice of the vocabulary, both float32 whatever the model's dtype."""
        budget = _SLICE_BYTES if flat.device.type == "cpu" else _SLICE_BYTES_DEVICE
        width = max(256, budget // (4 * max(1, flat.shape[0])))
        for start in range(0, self._head.weight.shape[0], width):
            weight = self._head.weight[start : start + width].float()
            bias = None if self._head.bias is None else self._head.bias[start : start + width].float()
            yield weight, functional.linear(flat, weight, bias)


class _AnyHead(HeadDivergence):
    """Both distributions, a window at a time."""

    def __init__(self, head: TargetHead, dense: Tensor, token_ids: Tensor) -> None:
        self._logits = head.logits
        self._dense = dense
        self._tokens = token_ids.to(dense.device)

    def measure(self, hidden: Tensor) -> WindowDamage:
        """See `HeadDivergence.measure`."""
        divergences, drops = [], []
        with torch.inference_mode():
            for before, after, tokens in zip(self._dense, hidden, self._tokens, strict=True):
                dense, changed = self._logits(before), self._logits(after)
                divergences.append(kl_divergence_of_logits(dense, changed))
                rows = torch.arange(len(tokens) - 1, device=tokens.device)
                said = [torch.log_softmax(z[:-1], dim=-1)[rows, tokens[1:]].double() for z in (dense, changed)]
                drops.append(said[0] - said[1])
            return _divergence(torch.stack(divergences), torch.stack(drops))


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("pw,pw->p", a.double(), b.double())


def _divergence(divergence: Tensor, drop: Tensor) -> WindowDamage:
    return WindowDamage(divergence.double().mean(dim=1).cpu().numpy(), drop.double().mean(dim=1).cpu().numpy())
