"""KL divergence of a design point's next-token distributions from the dense model's, on held-out text.

The dense model runs over the text once. Only the inputs of its output head are kept, a few megabytes; its
probabilities would be a hundred times as large. Both distributions are computed a few positions at a time. The result
is exact because surgery never changes the output head, so baseline and candidate share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.double_precision import in_double
from dse.errors import ModelError, NonFiniteError
from dse.evaluation.scoring import TargetHead
from dse.evaluation.statistics.intervals import Interval, student_interval
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["DenseDivergence", "Divergence", "check_head", "kl_divergence_of_logits"]

_BATCH_TOKENS = 1024
_CHUNK_BYTES = 32 * 2**20
_TOLERANCE = 1e-3
"""Largest difference between head(hidden) and the model's own logits, relative to the spread of the logits."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL(dense || point) on a text, in nats per token.

    Attributes:
        windows: Mean over the positions of each window, shape (windows,).
    """

    windows: NDArray[np.float64]

    @property
    def interval(self) -> Interval:
        """The mean with a 95 % interval over windows, since positions within a window depend on each other."""
        interval = student_interval(self.windows)
        low = None if interval.low is None else max(0.0, interval.low)
        return Interval(interval.value, low, interval.high, interval.documents)


class DenseDivergence:
    """KL divergence of any later state of a model from its dense state at construction.

    Every position of every window counts, conditioned on the preceding tokens of the window.

    Attributes:
        windows: Number of windows.
        fingerprint: Sixteen hexadecimal digits of the text.
    """

    def __init__(
        self, model: PreTrainedModel, token_ids: Tensor, *, progress: ProgressCallback = ignore_progress
    ) -> None:
        """Run the dense model over the text.

        Args:
            model: Dense, in evaluation mode; decomposed later, except for its output head.
            token_ids: Windows of text, shape (windows, tokens), int64.
            progress: Called as ("kl_divergence", tokens done, tokens in all).

        Raises:
            ModelError: The model's logits are not the output of its head, so they cannot be recomputed from its inputs.
        """
        self._model = model
        self.windows = token_ids.shape[0]
        digest = hashlib.sha256(f"{tuple(token_ids.shape)}".encode() + token_ids.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self._batches = torch.split(token_ids, max(1, _BATCH_TOKENS // token_ids.shape[1]))
        self._head = check_head(model, self._batches[0][:1])
        self._dense = [hidden.clone() for hidden in self._hidden_states(progress)]

    @property
    def tokens(self) -> int:
        """Number of positions compared."""
        return sum(batch.numel() for batch in self._batches)

    def of_dense(self) -> Divergence:
        """The dense model's divergence from itself: exactly 0."""
        return self.of_windows([0.0] * self.windows)

    def of_windows(self, means: Sequence[float]) -> Divergence:
        """A stored divergence, from the means of its windows."""
        return Divergence(np.asarray(means, dtype=np.float64))

    def measure(self, progress: ProgressCallback = ignore_progress) -> Divergence:
        """KL(dense || present state of the model).

        Args:
            progress: Called as ("kl_divergence", tokens done, tokens in all).

        Raises:
            NonFiniteError: The divergence of a window is NaN or infinite.
        """
        batches = zip(self._dense, self._hidden_states(progress), strict=True)
        found = self.of_windows([self._window(*pair) for batch in batches for pair in zip(*batch, strict=True)])
        if not np.isfinite(found.windows).all():
            raise NonFiniteError("KL divergences must be finite, but that of a window is not; the trial is invalid")
        return found

    def _window(self, dense: Tensor, point: Tensor) -> float:
        """Mean over the positions of one window; both arguments have the shape (tokens, width)."""
        rows = max(1, _CHUNK_BYTES // (4 * int(self._model.config.get_text_config().vocab_size)))
        total = 0.0
        with torch.inference_mode():
            for start in range(0, dense.shape[0], rows):
                part = slice(start, start + rows)
                total += float(kl_divergence_of_logits(self._head(dense[part]), self._head(point[part])).sum())
        return total / dense.shape[0]

    def _hidden_states(self, progress: ProgressCallback) -> Iterator[Tensor]:
        """Inputs of the output head, batch by batch, shape (windows, tokens, width)."""
        done = 0
        for batch in self._batches:
            progress("kl_divergence", done, self.tokens)
            yield _hidden(self._model, batch)
            done += batch.numel()
        progress("kl_divergence", done, self.tokens)


def kl_divergence_of_logits(dense: Tensor, point: Tensor) -> Tensor:
    """KL(softmax(dense) || softmax(point)) at each position, in nats.

    Args:
        dense: Logits, shape (positions, vocabulary).
        point: Logits, shape (positions, vocabulary).

    Returns:
        Shape (positions,), float64, non-negative.

    Source: Kullback and Leibler (1951).
    """
    log_dense = torch.log_softmax(dense.float(), dim=-1)
    log_point = torch.log_softmax(point.float(), dim=-1)
    # Rounding can give about -1e-8 for nearly equal distributions.
    return in_double(log_dense.exp() * (log_dense - log_point)).sum(dim=-1).clamp(min=0.0)


def _hidden(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    body: Any = model.base_model
    with torch.inference_mode():
        return body(input_ids=token_ids.to(model.device), use_cache=False)[0]  # type: ignore[no-any-return]


def check_head(model: PreTrainedModel, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The model's output head as a function from hidden states to logits, checked on a few tokens of this text.

    Raises:
        ModelError: The model has no output head, or its logits are not the output of its head.
    """
    if not isinstance(model.get_output_embeddings(), nn.Module):  # type: ignore[no-untyped-call]
        raise ModelError(
            f"KL divergence needs a model with an output head, but {type(model).__name__} has none; remove it"
        )
    head, probe = TargetHead(model).logits, token_ids[:, :8].to(model.device)
    with torch.inference_mode():
        ours, theirs = head(_hidden(model, probe)), model(input_ids=probe, use_cache=False).logits
    spread = float(theirs.float().std())
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > _TOLERANCE * max(spread, 1e-6):
        raise ModelError(
            f"KL divergence needs a model whose logits are the output of its head, but {type(model).__name__} computes"
            " them differently; remove `kl_divergence`, and set `fidelity.proxy_tokens: 0`"
        )
    return head
