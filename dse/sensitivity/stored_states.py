"""Forward passes that start at a changed layer, from stored hidden states of the dense model.

The layers before the changed one are the same for every option, so they are computed once. The model's own forward pass
runs, but each of these layers returns the stored output of the last of them without computing anything. Masks, position
embeddings and the final norm are left to the model, so this works for any architecture whose layers pass on nothing but
their output. `agrees` detects architectures that pass on more, for example shared keys and values.

Only the states of one layer are stored at a time, so layers are visited in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.decomposition.activation_grams import StopForward
from dse.models.layer_paths import layer_modules as layer_modules

__all__ = ["StoredStates", "full_pass", "layer_modules"]

_TOLERANCE = 1e-3
"""Largest difference from a full pass, relative to the spread of the states; 30 times as much in half precision."""


class StoredStates:
    """Hidden states of the dense model before one layer, and passes from there to the input of the output head.

    Attributes:
        layer: The first layer that a pass computes; 0 computes all.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
        """Start before layer 0, with nothing stored.

        Args:
            model: The dense model, in evaluation mode.
            layers: Its layers in order.
            batches: Token ids, each of shape (windows, tokens).
        """
        self._model = model
        self._layers = layers
        self._batches = batches
        self._outputs: list[Any] = [None] * len(batches)
        self.layer = 0

    def advance_to(self, layer: int) -> None:
        """Compute and store the states before `layer`; the model must be dense.

        Raises:
            ValueError: `layer` is smaller than the current layer.
        """
        if layer < self.layer:
            raise ValueError(f"layers must be visited in order, but {layer} comes before {self.layer}")
        if layer > self.layer:
            self._outputs = [self._output_of(layer - 1, batch) for batch in range(len(self._batches))]
            self.layer = layer

    def hidden(self, batch: int) -> Tensor:
        """Input of the output head for the current model, shape (windows, tokens, width).

        Valid only if the layers before `layer` are dense.
        """
        with _returning(self._layers[: self.layer], self._outputs[batch]):
            return full_pass(self._model, self._batches[batch])

    def agrees(self, batch: int, expected: Tensor) -> bool:
        """Whether a pass of the dense model from the stored states equals its full pass.

        The layers before `layer` stay dense, so testing the dense model is sufficient.

        Args:
            expected: Output of a full pass of the dense model, shape (windows, tokens, width).
        """
        try:
            found = self.hidden(batch).float()
        except Exception:  # noqa: BLE001 - a layer may fail in any way if another layer's results are missing
            return False
        is_half = next(self._model.parameters()).dtype in (torch.float16, torch.bfloat16)
        spread, tolerance = float(expected.float().std()), _TOLERANCE * (30 if is_half else 1)
        return float((found - expected.float()).abs().max()) <= tolerance * max(spread, 1e-6)

    def _output_of(self, layer: int, batch: int) -> Any:
        seen: list[Any] = []

        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.append(output)
            raise StopForward

        handle = self._layers[layer].register_forward_hook(see)
        try:
            with _returning(self._layers[: self.layer], self._outputs[batch]), contextlib.suppress(StopForward):
                full_pass(self._model, self._batches[batch])
        finally:
            handle.remove()
        return _cloned(seen[0])


def full_pass(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Hidden states after the final norm, shape (windows, tokens, width)."""
    body: Any = model.base_model
    with torch.inference_mode():
        return body(input_ids=token_ids.to(model.device), use_cache=False)[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _returning(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Make these layers return copies of `output` without computing anything."""

    def stored_output(*_arguments: Any, **_keywords: Any) -> Any:
        return _cloned(output)  # a later layer may add to it in place

    before: list[Callable[..., Any] | None] = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = stored_output
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _cloned(output: Any) -> Any:
    """A copy of a tensor, or of a tuple that contains tensors."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(_cloned(part) for part in output) if isinstance(output, tuple) else output
