"""Log-probabilities of given tokens from hidden states, without storing the logits of all tokens.

The output head is the widest matrix of a small model (49,152 x 576 in SmolLM2: a quarter of its operations), and its
logits are far larger than anything else (200 KB per token). It is therefore applied only to positions that predict a
scored token, to many of them at once, and to one slice of the vocabulary at a time: a slice of logits stays in the
cache while its maximum and its sum of exponentials are computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.double_precision import in_double

__all__ = ["TargetHead", "TargetScores"]

_SLICE_TOKENS = 4096
"""Tokens per slice of the vocabulary on a CPU: 512 positions x 4,096 logits are 8 MB, which fit a last-level cache."""

_GPU_LOGITS = 2**28
"""Logits per slice on an accelerator: 1 GiB in float32."""

# Transformations of the logits after the head, by key of the model config. All are elementwise and increasing.
_AFTER_HEAD: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
}


@dataclass(frozen=True, eq=False)
class TargetScores:
    """Scores of targets, in the requested order.

    Attributes:
        log_probabilities: float64, shape (targets,).
        is_largest: Whether no token has a larger logit, shape (targets,).
    """

    log_probabilities: NDArray[np.float64]
    is_largest: NDArray[np.bool_]


class TargetHead:
    """The output head of a causal language model, applied to selected positions.

    The caller must verify that it agrees with the model: an architecture may transform its logits in a way that is
    missing from the table above.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        config = model.config.get_text_config()
        found = [(after, getattr(config, key, None)) for key, after in _AFTER_HEAD.items()]
        self._after = [(after, float(value)) for after, value in found if isinstance(value, int | float) and value]

    @property
    def module(self) -> Any:
        """The present head of the model."""
        return self._model.get_output_embeddings()  # type: ignore[no-untyped-call]

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a matrix product without a transformation afterwards."""
        return type(self.module) is nn.Linear and not self._after

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the whole vocabulary, float32, shape (..., vocabulary), for states of shape (..., width)."""
        return self._finish(self.module(hidden))

    def score(
        self, hidden: Tensor, positions: Sequence[int], targets: Sequence[int], *, most_states: int = sys.maxsize
    ) -> TargetScores:
        """Score `targets[i]` as predicted by the hidden state `positions[i]`.

        Args:
            hidden: Hidden states before the head, shape (states, width).
            positions: Index of the state of each target, shape (targets,).
            targets: Token ids, shape (targets,).
            most_states: Maximum number of states in one product with the head.
        """
        places, tokens = np.asarray(positions), np.asarray(targets)
        log_probabilities, is_largest = np.empty(len(tokens)), np.empty(len(tokens), dtype=np.bool_)
        for start in range(0, hidden.shape[0], most_states):
            chosen = np.flatnonzero((places >= start) & (places < start + most_states))
            if chosen.size:
                part = self._score(hidden[start : start + most_states], places[chosen] - start, tokens[chosen])
                log_probabilities[chosen], is_largest[chosen] = part.log_probabilities, part.is_largest
        return TargetScores(log_probabilities, is_largest)

    def _score(self, hidden: Tensor, positions: NDArray[np.int64], targets: NDArray[np.int64]) -> TargetScores:
        # Sorted by token, the targets in a slice of the vocabulary are contiguous.
        order = np.argsort(targets, kind="stable")
        ids, rows = targets[order], torch.as_tensor(positions[order], device=hidden.device)
        tokens = torch.as_tensor(ids, device=hidden.device)
        own = torch.zeros(len(ids), device=hidden.device)
        # Running log-sum-exp over the slices, relative to the highest logit so far (Milakov and Gimelshein 2018).
        highest = torch.full((hidden.shape[0],), -torch.inf, device=hidden.device)
        total = torch.zeros_like(highest)
        begin = 0
        for start, logits in self._slices(hidden):
            end = int(np.searchsorted(ids, start + logits.shape[1]))
            own[begin:end] = logits[rows[begin:end], tokens[begin:end] - start]
            begin = end
            above = torch.maximum(highest, logits.amax(dim=1))
            total = total * torch.exp(highest - above) + logits.sub_(above[:, None]).exp_().sum(dim=1)
            highest = above
        scores = in_double(own) - in_double(highest[rows]) - in_double(total[rows]).log()
        is_largest = own >= highest[rows]
        back = np.argsort(order)
        return TargetScores(scores.cpu().numpy()[back], is_largest.cpu().numpy()[back])

    def _slices(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first token, logits of a slice of the vocabulary), one slice at a time."""
        head = self.module
        if type(head) is not nn.Linear:  # decomposed, or a custom class: applied as a whole
            yield 0, self.logits(hidden)
            return
        width = _SLICE_TOKENS if hidden.device.type == "cpu" else max(1, _GPU_LOGITS // max(1, hidden.shape[0]))
        for start in range(0, head.weight.shape[0], width):
            part = slice(start, start + width)
            bias = None if head.bias is None else head.bias[part]
            yield start, self._finish(nn.functional.linear(hidden, head.weight[part], bias))

    def _finish(self, logits: Tensor) -> Tensor:
        for after, value in self._after:
            logits = after(logits, value)
        return logits.float()
