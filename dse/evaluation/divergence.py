"""How far a point's next-token distributions lie from the dense model's: KL divergence on text, exact and cheap.

The dense model runs over the text once. What is kept of it is what its output head reads - a few megabytes - and not
its probabilities, which are a hundred times as large; both distributions are formed a few positions at a time. That
is exact because surgery never touches the head: dense and point share it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.errors import ModelError, NonFiniteError
from dse.evaluation.scoring import TargetHead
from dse.evaluation.statistics.intervals import Interval, student_quantile
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["DenseDivergence", "Divergence", "check_head", "kl_divergence_of_logits"]

_BATCH_TOKENS = 1024
_CHUNK_BYTES = 32 * 2**20
_TOLERANCE = 1e-3
"""Largest difference, relative to the spread of the logits, between head(hidden) and what the model itself returns."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL(dense || point) on a text.

    Attributes:
        windows: Mean over the positions of each window, nats per token, shape (windows,).
    """

    windows: NDArray[np.float64]

    @property
    def interval(self) -> Interval:
        """Nats per token, with a 95 % interval over windows: positions of one window depend on each other."""
        mean, count = float(self.windows.mean()), self.windows.size
        if count < 2:
            return Interval(mean, None, None, count)
        half = student_quantile(0.975, count - 1) * float(self.windows.std(ddof=1)) / math.sqrt(count)
        return Interval(mean, max(0.0, mean - half), mean + half, count)


class DenseDivergence:
    """KL divergence of any state of a model to the dense state it was in when this was made.

    Every position of every window counts, each conditioned on the window's tokens up to it.

    Attributes:
        windows: Number of windows.
        fingerprint: 16 hexadecimal digits of the text.
    """

    def __init__(
        self, model: PreTrainedModel, token_ids: Tensor, *, progress: ProgressCallback = ignore_progress
    ) -> None:
        """Run the dense model over the text.

        Args:
            model: Dense, in evaluation mode; decomposed later, with its output head left as it is.
            token_ids: Windows of text, shape (windows, tokens), int64.
            progress: Called as ("kl_divergence", tokens done, tokens).

        Raises:
            ModelError: The model's logits are not its head's output, so that they cannot be formed from what is kept.
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
        """Positions compared."""
        return sum(batch.numel() for batch in self._batches)

    def of_dense(self) -> Divergence:
        """The dense model's own divergence: nothing, exactly."""
        return self.of_windows([0.0] * self.windows)

    def of_windows(self, means: Sequence[float]) -> Divergence:
        """A divergence that was measured before, window by window."""
        return Divergence(np.asarray(means, dtype=np.float64))

    def measure(self, progress: ProgressCallback = ignore_progress) -> Divergence:
        """KL(dense || the model as it is now).

        Args:
            progress: Called as ("kl_divergence", tokens done, tokens).

        Raises:
            NonFiniteError: An activation of the point is NaN or infinite.
        """
        means: list[float] = []
        for dense, hidden in zip(self._dense, self._hidden_states(progress), strict=True):
            for dense_window, point_window in zip(dense, hidden, strict=True):
                means.append(self._window(dense_window, point_window))
        found = self.of_windows(means)
        if not np.isfinite(found.windows).all():
            raise NonFiniteError("KL divergences must be finite, but a window's is not; the trial is void")
        return found

    def _window(self, dense: Tensor, point: Tensor) -> float:
        """Mean over one window's positions; both of shape (tokens, width)."""
        rows = max(1, _CHUNK_BYTES // (4 * self._vocabulary))
        total = 0.0
        with torch.inference_mode():
            for start in range(0, dense.shape[0], rows):
                part = slice(start, start + rows)
                total += float(kl_divergence_of_logits(self._head(dense[part]), self._head(point[part])).sum())
        return total / dense.shape[0]

    @property
    def _vocabulary(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    def _hidden_states(self, progress: ProgressCallback) -> Iterator[Tensor]:
        """What the head reads, batch by batch, shape (windows, tokens, width)."""
        done = 0
        for batch in self._batches:
            progress("kl_divergence", done, self.tokens)
            yield _hidden(self._model, batch)
            done += batch.numel()
        progress("kl_divergence", done, self.tokens)


def kl_divergence_of_logits(dense: Tensor, point: Tensor) -> Tensor:
    """KL(softmax(dense) || softmax(point)) of each position, nats.

    Args:
        dense: Shape (positions, vocabulary).
        point: Shape (positions, vocabulary).

    Returns:
        Shape (positions,), float64, at least 0.

    Source: Kullback and Leibler (1951).
    """
    log_dense = torch.log_softmax(dense.float(), dim=-1)
    log_point = torch.log_softmax(point.float(), dim=-1)
    # Rounding can leave a few 1e-8 below zero, where two distributions are all but one.
    return (log_dense.exp() * (log_dense - log_point)).sum(dim=-1, dtype=torch.float64).clamp(min=0.0)


def _hidden(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    body: Any = model.base_model
    with torch.inference_mode():
        return body(input_ids=token_ids.to(model.device), use_cache=False)[0]  # type: ignore[no-any-return]


def check_head(model: PreTrainedModel, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from what the output head reads to logits, checked on a few tokens of this text.

    Raises:
        ModelError: The model has no output head, or its logits are not its head's output.
    """
    if not isinstance(model.get_output_embeddings(), nn.Module):  # type: ignore[no-untyped-call]
        raise ModelError(
            f"KL divergence needs a model with an output head, but {type(model).__name__} has none; leave it out"
        )
    head, probe = TargetHead(model).logits, token_ids[:, :8].to(model.device)
    with torch.inference_mode():
        ours, theirs = head(_hidden(model, probe)), model(input_ids=probe, use_cache=False).logits
    spread = float(theirs.float().std())
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > _TOLERANCE * max(spread, 1e-6):
        raise ModelError(
            f"KL divergence needs a model whose logits are its output head's, but those of {type(model).__name__} are"
            " formed otherwise; leave out `kl_divergence`, and set `fidelity.proxy_tokens: 0`"
        )
    return head
