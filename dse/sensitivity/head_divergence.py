"""KL divergence and log-likelihood from hidden states, with one pass of the output head per changed model.

With logits z = W h + b, the dense model's probabilities p and the expected row e = W^T p of the head,

    KL(p || q) = sum_v p_v (z_v - z'_v) + lse(z') - lse(z) = e . (h - h') + lse(z') - lse(z),

because the contributions of b cancel. Storing h, e and lse(z) of the dense model takes a few KB per token instead of
the 200 KB of its probabilities (vocabulary of 49,152 tokens). Measuring a changed model takes one product with W, whose
logits are summed over slices of the vocabulary and not stored. As a difference of differences, the result is accurate
for small changes too.

Heads that transform their logits (soft-capping) have no such row; for them both distributions are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dse.double_precision import in_double
from dse.evaluation.divergence import check_head, kl_divergence_of_logits
from dse.evaluation.scoring import TargetHead

__all__ = ["HeadDivergence", "WindowDivergence", "head_divergences"]

_SLICE_BYTES = 16 * 2**20
"""Size of a slice of logits on a CPU: fits into a last-level cache."""
_SLICE_BYTES_DEVICE = 2**29


@dataclass(frozen=True, eq=False)
class WindowDivergence:
    """Divergence of a changed model from the dense one on each window of a batch, nats per token.

    Attributes:
        kl_divergence: KL(dense || changed), mean over the positions of a window, shape (windows,).
        log_likelihood_drop: Mean log-likelihood of the next tokens, dense minus changed, shape (windows,).
    """

    kl_divergence: NDArray[np.float64]
    log_likelihood_drop: NDArray[np.float64]


class HeadDivergence(ABC):
    """The dense model's predictions on one batch of windows, for comparison with those of a changed model."""

    @abstractmethod
    def measure(self, hidden: Tensor) -> WindowDivergence:
        """Divergence of a changed model.

        Args:
            hidden: Its hidden states before the output head, shape (windows, tokens, width).
        """


def head_divergences(
    model: PreTrainedModel, dense: Sequence[Tensor], batches: Sequence[Tensor]
) -> list[HeadDivergence]:
    """One `HeadDivergence` per batch, of the cheaper kind if the model's head is linear.

    Args:
        model: The model; its output head is never decomposed.
        dense: Hidden states of the dense model, each of shape (windows, tokens, width).
        batches: Token ids, each of shape (windows, tokens).

    Raises:
        ModelError: The model has no output head, or its logits differ from those of its head.
    """
    check_head(model, batches[0][:1])
    head = TargetHead(model)
    kind = _LinearHead if head.is_linear else _AnyHead
    return [kind(head, h, ids) for h, ids in zip(dense, batches, strict=True)]


class _LinearHead(HeadDivergence):
    """Stores the expected row of the head instead of the probabilities; see the module docstring."""

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

    def measure(self, hidden: Tensor) -> WindowDivergence:
        """See `HeadDivergence.measure`."""
        with torch.inference_mode():
            change = (self._dense - hidden.float()).flatten(0, 1)
            shift = self._log_sum_of(hidden.float().flatten(0, 1)) - self._log_sum
            divergence = _row_products(self._expected, change) + shift
            # Log-likelihood of the next token: the row of that token instead of the expected row.
            shape = self._tokens.shape
            target_rows = self._head.weight[self._tokens.roll(-1, dims=1).flatten()].float()
            drop = (_row_products(target_rows, change) + shift).reshape(shape)[:, :-1]
            return _window_means(divergence.reshape(shape).clamp(min=0.0), drop)

    def _log_sum_of(self, flat: Tensor) -> Tensor:
        """Log-sum-exp of the logits, shape (positions,), float64."""
        with torch.inference_mode():
            parts = [torch.logsumexp(logits, dim=1) for _, logits in self._slices(flat)]
            return torch.logsumexp(in_double(torch.stack(parts, dim=1)), dim=1)

    def _slices(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the head, logits) for each slice of the vocabulary, in float32 for any dtype of the model."""
        budget = _SLICE_BYTES if flat.device.type == "cpu" else _SLICE_BYTES_DEVICE
        width = max(256, budget // (4 * max(1, flat.shape[0])))
        for start in range(0, self._head.weight.shape[0], width):
            weight = self._head.weight[start : start + width].float()
            bias = None if self._head.bias is None else self._head.bias[start : start + width].float()
            yield weight, functional.linear(flat, weight, bias)


class _AnyHead(HeadDivergence):
    """Computes both distributions, one window at a time."""

    def __init__(self, head: TargetHead, dense: Tensor, token_ids: Tensor) -> None:
        self._logits = head.logits
        self._dense = dense
        self._tokens = token_ids.to(dense.device)

    def measure(self, hidden: Tensor) -> WindowDivergence:
        """See `HeadDivergence.measure`."""
        divergences, drops = [], []
        with torch.inference_mode():
            for before, after, tokens in zip(self._dense, hidden, self._tokens, strict=True):
                dense, changed = self._logits(before), self._logits(after)
                divergences.append(kl_divergence_of_logits(dense, changed))
                rows = torch.arange(len(tokens) - 1, device=tokens.device)
                targets = [in_double(torch.log_softmax(z[:-1], dim=-1)[rows, tokens[1:]]) for z in (dense, changed)]
                drops.append(targets[0] - targets[1])
            return _window_means(torch.stack(divergences), torch.stack(drops))


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("pw,pw->p", in_double(a), in_double(b))


def _window_means(divergence: Tensor, drop: Tensor) -> WindowDivergence:
    return WindowDivergence(in_double(divergence).mean(dim=1).cpu().numpy(), in_double(drop).mean(dim=1).cpu().numpy())
