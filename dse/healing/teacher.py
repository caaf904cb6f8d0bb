"""The dense model's side of the loss: what its output head reads, stored for every window of the training text.

Logits would be a hundred times as large. They are computed from the stored states, a few positions at a time, by the
output head, which no design point changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dse.decomposition.calibration_text import CalibrationWindows
from dse.evaluation.divergence import check_head
from dse.models.tensor_store import StoreBudget, TensorStore
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["Teacher"]

_BATCH_TOKENS = 1024
_CHUNK_BYTES = 64 * 2**20


class Teacher:
    """Inputs of the dense model's output head for all training windows, and the loss that compares a point with them.

    Attributes:
        windows: The training text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: CalibrationWindows,
        folder: Path,
        *,
        progress: ProgressCallback = ignore_progress,
    ) -> None:
        """Run the dense model over the text.

        Args:
            model: Dense, in evaluation mode.
            windows: The training text.
            folder: Where states go for which there is no room in memory.
            progress: Called as ("teacher", windows done, windows in all).

        Raises:
            ModelError: The model's logits are not the output of its head.
        """
        self.windows = windows
        self._model = model
        self._head = check_head(model, windows.token_ids[:1])
        self._states = TensorStore(StoreBudget.of(model.device), folder)
        count = len(windows.token_ids)
        together = max(1, _BATCH_TOKENS // windows.token_ids.shape[1])
        for start in range(0, count, together):
            progress("teacher", start, count)
            with torch.inference_mode():
                states = self._hidden(windows.token_ids[start : start + together])
            for offset, state in enumerate(states):
                self._states.put(start + offset, state.clone())
        progress("teacher", count, count)

    def backward(self, rows: Sequence[int]) -> float:
        """Mean KL(dense || point) over the positions of these windows, in nats; adds its gradient to the parameters.

        The logits and their gradient exist for a few positions at a time.

        Args:
            rows: Indices of windows.
        """
        hidden = self._hidden(self.windows.token_ids[list(rows)])
        own = hidden.detach().requires_grad_()
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        positions = max(1, _CHUNK_BYTES // (4 * vocabulary))
        count, total = hidden.shape[0] * hidden.shape[1], 0.0
        for row, state in zip(rows, own, strict=True):
            dense = self._states.get(row, hidden.device)
            for start in range(0, len(state), positions):
                part = slice(start, start + positions)
                with torch.no_grad():
                    log_dense = torch.log_softmax(self._head(dense[part]).float(), dim=-1)
                log_point = torch.log_softmax(self._head(state[part]).float(), dim=-1)
                loss = (log_dense.exp() * (log_dense - log_point)).sum() / count
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        assert own.grad is not None  # noqa: S101 - every position has a loss
        hidden.backward(own.grad)  # type: ignore[no-untyped-call]
        return total

    def _hidden(self, token_ids: Tensor) -> Tensor:
        body: Any = self._model.base_model
        return body(input_ids=token_ids.to(self._model.device), use_cache=False)[0]  # type: ignore[no-any-return]
