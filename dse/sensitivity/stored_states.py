"""The layers behind a changed one, from hidden states that the dense model left in front of it.

What lies in front of the changed layer is the same for every option, so it is computed once: the model's own forward
pass runs with the first layers answering at once with what the dense model's last of them returned. Masks, position
embeddings and the final norm are the model's own business, so this holds for any architecture whose layers hand on
nothing but their output; whether one does more (shared keys and values, say) is found out by `agrees`.

One set of states is held at a time, of the layer that is being changed: layers are visited in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.decomposition.gram import StopForward
from dse.topology import Topology

__all__ = ["StoredStates", "blocks_of"]

_TOLERANCE = 1e-3
"""Largest difference between states of the two ways, relative to their spread; half precision is held to 30 times."""


class StoredStates:
    """Dense hidden states in front of one layer, and passes from there to what the output head reads.

    Attributes:
        layer: The next layer that a pass computes; 0 computes all.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
        """Start in front of layer 0, where nothing is stored.

        Args:
            model: Dense, in evaluation mode.
            blocks: Its layers in order.
            batches: Token ids, each of shape (windows, tokens).
        """
        self._model = model
        self._blocks = blocks
        self._batches = batches
        self._outputs: list[Any] = [None] * len(batches)
        self.layer = 0

    def advance_to(self, layer: int) -> None:
        """Have the states in front of `layer`; the model must be dense.

        Args:
            layer: Not in front of where the states are now.
        """
        if layer < self.layer:
            raise ValueError(f"layers are visited in order, but {layer} comes before {self.layer}")
        if layer > self.layer:
            self._outputs = [self._output_of(layer - 1, batch) for batch in range(len(self._batches))]
            self.layer = layer

    def hidden(self, batch: int) -> Tensor:
        """What the output head reads with the model as it is now, shape (windows, tokens, width).

        Right only if nothing in front of `layer` was changed.
        """
        with _answering(self._blocks[: self.layer], self._outputs[batch]):
            return full_pass(self._model, self._batches[batch])

    def agrees(self, batch: int, expected: Tensor) -> bool:
        """Whether a pass of the dense model from here ends where its whole pass did.

        Everything in front is dense whatever is changed behind, so a dense pass is test enough.

        Args:
            batch: Which batch.
            expected: What the whole dense model computes for it, shape (windows, tokens, width).
        """
        try:
            found = self.hidden(batch).float()
        except Exception:  # noqa: BLE001 - whatever a layer says when what it wants of another is missing
            return False
        spread, tolerance = float(expected.float().std()), _TOLERANCE * (30 if _is_half(self._model) else 1)
        return float((found - expected.float()).abs().max()) <= tolerance * max(spread, 1e-6)

    def _output_of(self, layer: int, batch: int) -> Any:
        seen: list[Any] = []

        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.append(output)
            raise StopForward

        handle = self._blocks[layer].register_forward_hook(see)
        try:
            with _answering(self._blocks[: self.layer], self._outputs[batch]), contextlib.suppress(StopForward):
                full_pass(self._model, self._batches[batch])
        finally:
            handle.remove()
        return _cloned(seen[0])


def blocks_of(model: nn.Module, topology: Topology) -> list[nn.Module]:
    """The layers of a model in order, found by the modules of their tensors."""
    found: dict[int, nn.Module] = {}
    for tensor in topology.tensors:
        if tensor.layer is not None and tensor.layer not in found:
            head, _, _ = f".{tensor.module}.".partition(f".{tensor.layer}.")
            found[tensor.layer] = model.get_submodule(f"{head[1:]}.{tensor.layer}")
    return [found[layer] for layer in sorted(found)]


def full_pass(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Hidden states behind the final norm, shape (windows, tokens, width)."""
    body: Any = model.base_model
    with torch.inference_mode():
        return body(input_ids=token_ids.to(model.device), use_cache=False)[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _answering(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Have these layers return (copies of) one output without computing anything."""

    def answer(*_arguments: Any, **_keywords: Any) -> Any:
        return _cloned(output)  # a later layer may add to it in place

    before: list[Callable[..., Any] | None] = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = answer
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _cloned(output: Any) -> Any:
    """A tensor, or a tuple that holds some, in memory of its own."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(_cloned(part) for part in output) if isinstance(output, tuple) else output


def _is_half(model: PreTrainedModel) -> bool:
    return next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
