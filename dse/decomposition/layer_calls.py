"""Call the layers of a model one by one, as its own forward pass does.

Everything that a layer receives beside the hidden states (masks, positions, rotary embeddings) depends on the shape of
the batch, not on the layers. So the model's own forward pass runs once with layers that return their input, and records
what each layer is given. Afterwards a layer can be called alone. `check_layer_calls` compares this with the model's own
pass, because an architecture may pass on more than hidden states.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dse.decomposition.activation_grams import StopForward

__all__ = ["CallRecorder", "LayerCall", "NotSequentialError", "check_layer_calls", "layers_replaced"]

_TOLERANCE = 1e-3
"""Largest difference from the model's own pass, relative to the spread of the states; 30 times as much in half
precision.
"""


class NotSequentialError(Exception):
    """The layers of this model cannot be called one by one; the message is the reason."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What one layer is given beside the hidden states.

    Attributes:
        arguments: Positional arguments after the hidden states.
        keywords: Keyword arguments.
        keyword: Name under which the hidden states are given; empty if they are the first positional argument.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    keyword: str = ""

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after the layer."""
        arguments, keywords = (_moved(part, hidden.device) for part in (self.arguments, dict(self.keywords)))
        if self.keyword:
            output = layer(*arguments, **{self.keyword: hidden}, **keywords)
        else:
            output = layer(hidden, *arguments, **keywords)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


@dataclass(eq=False)
class CallRecorder:
    """Records the calls of all layers for batches of tokens.

    Attributes:
        model: The model; only what stands before its layers needs weights.
        layers: Its layers in order.
        extras: What a layer returns beside hidden states; None if it returns a tensor.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    extras: tuple[Any, ...] | None = None
    _known: list[Tensor] = field(default_factory=list)

    def record(self, token_ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """The hidden states before the first layer, and what each layer is given.

        Raises:
            NotSequentialError: A layer is not called exactly once, or is given more than tensors and plain values.
        """
        calls: list[LayerCall] = []
        first: list[Tensor] = []
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def stub(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                if index != len(calls):
                    raise NotSequentialError("its layers are not called one after the other")
                hidden, call = _split(arguments, keywords)
                keywords = {key: self._shared(part, seen) for key, part in call[1].items()}
                calls.append(LayerCall(self._shared(call[0], seen), keywords, call[2]))
                if index == 0:
                    first.append(hidden.clone())
                if index == len(self.layers) - 1:
                    raise StopForward
                return hidden if self.extras is None else (hidden, *self.extras)

            return forward

        with layers_replaced(self.layers, [stub(i) for i in range(len(self.layers))]):
            _run_body(self.model, token_ids)
        if len(calls) != len(self.layers):
            raise NotSequentialError(f"its forward pass calls {len(calls)} of {len(self.layers)} layers")
        return first[0], calls

    def _shared(self, value: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """The same value, in which tensors that equal those of an earlier batch are replaced by them."""
        if isinstance(value, Tensor):
            if id(value) not in seen:
                equal = (known for known in self._known if _is_equal(known, value))
                found = next(equal, None)
                if found is None:
                    found = value.clone()  # a later layer may change it in place
                    self._known.append(found)
                seen[id(value)] = (value, found)  # keeps the value alive, so that its id is not reused
            return seen[id(value)][1]
        if isinstance(value, (tuple, list)):
            return type(value)(self._shared(part, seen) for part in value)
        if isinstance(value, dict) and value and all(isinstance(part, Tensor) for part in value.values()):
            return {key: self._shared(part, seen) for key, part in value.items()}
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return value
        raise NotSequentialError(f"its layers share an object of type {type(value).__name__}")


@torch.no_grad()
def check_layer_calls(recorder: CallRecorder, token_ids: Tensor, count: int) -> None:
    """Compare the first `count` layers, called one by one, with the model's own pass.

    Sets the recorder's `extras`.

    Args:
        recorder: Recorder of the model; these layers, and what stands before them, have weights.
        token_ids: A short text.
        count: Number of layers to compare.

    Raises:
        NotSequentialError: They differ, or the layers cannot be called at all.
    """
    expected: list[Tensor] = []

    def see(_module: nn.Module, _arguments: Any, output: Any) -> None:
        recorder.extras = tuple(output[1:]) if isinstance(output, tuple) else None
        expected.append((output[0] if isinstance(output, tuple) else output).clone())
        if len(expected) == count:
            raise StopForward

    with ExitStack() as hooks:
        for layer in recorder.layers[:count]:
            hooks.enter_context(layer.register_forward_hook(see))
        _run_body(recorder.model, token_ids)
    if len(expected) != count:
        raise NotSequentialError("its layers are not called one after the other")
    hidden, calls = recorder.record(token_ids)
    for index, (layer, call) in enumerate(zip(recorder.layers[:count], calls, strict=False)):
        try:
            hidden = call(layer, _on_device_of(layer, hidden))
        except Exception as error:  # a layer may fail in any way if it misses what another one left
            raise NotSequentialError(f"layer {index} cannot be called alone ({error})") from error
        found, wanted = hidden.float(), expected[index].float().to(hidden.device)
        is_half = hidden.dtype in (torch.float16, torch.bfloat16)
        limit = _TOLERANCE * (30 if is_half else 1) * max(float(wanted.std()), 1e-6)
        if found.shape != wanted.shape or not bool(((found - wanted).abs() <= limit).all()):
            raise NotSequentialError(f"layer {index} called alone differs from the model's own pass")


@contextmanager
def layers_replaced(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward functions of these layers."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def _split(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, tuple[Any, dict[str, Any], str]]:
    """The hidden states, and the other arguments of a layer's call."""
    if arguments and isinstance(arguments[0], Tensor):
        return arguments[0], (arguments[1:], keywords, "")
    hidden = keywords.get("hidden_states")
    if arguments or not isinstance(hidden, Tensor):
        raise NotSequentialError("its layers do not take hidden states first")
    return hidden, ((), {k: v for k, v in keywords.items() if k != "hidden_states"}, "hidden_states")


def _run_body(model: nn.Module, token_ids: Tensor) -> None:
    """Run the model without its output head and without a cache, until it ends or `StopForward` is raised."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    takes_cache = "use_cache" in inspect.signature(body.forward).parameters
    with torch.no_grad(), contextlib.suppress(StopForward):
        body(token_ids, **({"use_cache": False} if takes_cache else {}))


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _on_device_of(layer: nn.Module, hidden: Tensor) -> Tensor:
    return hidden.to(next(layer.parameters()).device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, device) for part in value)
    return {key: _moved(part, device) for key, part in value.items()} if isinstance(value, dict) else value
