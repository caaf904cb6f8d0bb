"""Modes with a static cache: every decode step is one program, compiled or captured as a CUDA graph.

Serving engines run decode in this way. At small batch sizes an eager step mostly measures Python and kernel launches,
of which a low-rank layer has more than a dense one.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dse.errors import InvalidMeasurementError
from dse.measurement.execution import Execution, Generation, Variant

__all__ = ["CompiledExecution", "CudaGraphExecution", "StaticExecution"]

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class StaticExecution(Execution):
    """One cache of fixed size per variant; position and mask are tensors, so every decode step is the same program.

    The program itself runs eagerly here; the modes compile or capture it. Layers with a sliding window keep all
    positions, and the mask hides those outside the window: the tokens are the same, and the program is, too.
    """

    mode = "static"

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, new_tokens, options)
        self._length = prompt.shape[1] + new_tokens
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._columns = torch.arange(self._length, device=prompt.device)
        self._layer_types: tuple[str, ...] = ()
        self._caches: dict[Variant, Any] = {}
        self._programs: dict[Variant, Any] = {}

    @torch.inference_mode()
    def begin(self, variant: Variant) -> Generation:
        """See `Execution.begin`. The variant's cache is reset and reused, because a new one needs a new program."""
        if variant not in self._caches:
            self._caches[variant] = self._new_cache()
        self._caches[variant].reset()
        return Generation(None, self._caches[variant])

    def prefill(self, generation: Generation) -> None:
        """See `Execution.prefill`."""
        self._forward(generation, self._prompt)

    @torch.inference_mode()
    def step(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.step`."""
        generation.next_tokens = self._fixed_step(_tokens(generation), generation.cache)

    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """See `Execution.rewind`; cache entries after the position are masked and overwritten."""
        self._move(generation.cache, -self._new_tokens)
        generation.next_tokens = first_tokens
        return True

    def fixed_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """One decode step: (batch, 1) tokens to (batch, vocabulary) logits; the cache advances in place."""
        # The model moves the cache's own position while it runs, and GPT-J reads the positions again in every layer.
        position = cache.layers[0].cumulative_length.clone()
        masks = {kind: self._mask(kind, position, len(tokens)) for kind in self._layer_types}
        more: dict[str, Any] = {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}
        if self._takes_positions:
            more["position_ids"] = position.expand(tokens.shape[0], 1)
        output = self._model(input_ids=tokens, past_key_values=cache, **self._options, **more)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _fixed_step(self, tokens: Tensor, cache: Any) -> Tensor:
        """The program of one decode step: (batch, 1) tokens to the next tokens."""
        return self.fixed_logits(tokens, cache).argmax(dim=-1, keepdim=True)

    def _mask(self, kind: str, position: Tensor, batch: int) -> Tensor:
        """Additive mask, which every attention implementation accepts: 0, or the lowest number for hidden positions."""
        is_hidden = self._columns > position
        if kind == _SLIDING:
            is_hidden = is_hidden | (self._columns <= position - self._text_config.sliding_window)
        elif kind == _CHUNKED:
            chunk = self._text_config.attention_chunk_size
            is_hidden = is_hidden | (self._columns < position // chunk * chunk)
        mask = is_hidden.to(self._model.dtype) * torch.finfo(self._model.dtype).min
        return mask.expand(batch, 1, 1, -1)

    def _new_cache(self) -> Any:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        cache = StaticCache(config=self._model.config, max_cache_len=self._length)
        is_windowed = [bool(getattr(layer, "is_sliding", False)) for layer in cache.layers]
        named = getattr(self._text_config, "layer_types", None)
        kinds = tuple(named) if named else tuple(_SLIDING if windowed else _FULL for windowed in is_windowed)
        self._layer_types = tuple(dict.fromkeys(kinds))
        if unknown := [kind for kind in self._layer_types if kind not in (_FULL, _SLIDING, _CHUNKED)]:
            raise InvalidMeasurementError(
                f"a static cache must hold keys and values of every layer, but {type(self._model).__name__} has layers"
                f" of type '{unknown[0]}'; use mode eager"
            )
        for index, windowed in enumerate(is_windowed):
            if windowed:
                cache.layers[index] = StaticLayer(max_cache_len=self._length)
        return cache

    @property
    def _text_config(self) -> Any:
        return self._model.config.get_text_config(decoder=True)

    @staticmethod
    @torch.inference_mode()
    def _move(cache: Any, tokens: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.add_(tokens)


class CompiledExecution(StaticExecution):
    """The decode step compiled by `torch.compile`, once per variant."""

    mode = "compile"

    def prepare(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.prepare`; compiling takes seconds to minutes."""
        if variant in self._programs:
            return
        if not self._programs:
            torch._dynamo.reset()  # otherwise programs of earlier points fill its cache
        step = with_own_code(lambda tokens, cache: self._fixed_step(tokens, cache), f"decode_{variant}")
        self._programs[variant] = torch.compile(step, dynamic=False)
        first = generation.next_tokens
        self.step(variant, generation)
        generation.next_tokens = first
        self._move(generation.cache, -1)

    @torch.inference_mode()
    def step(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.step`."""
        generation.next_tokens = self._programs[variant](_tokens(generation), generation.cache)


def with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of `function` with a code object of its own.

    torch keeps compiled programs by code object. Two variants that share one would check each other's guards at every
    step, and count together against the limit after which torch silently runs eagerly.
    """
    assert isinstance(function, types.FunctionType)  # noqa: S101 - narrows the type
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


class CudaGraphExecution(StaticExecution):
    """The decode step captured as a CUDA graph, once per variant: one launch per token."""

    mode = "cuda_graph"
    _WARMUP_STEPS = 3  # libraries pick algorithms and allocate workspaces in their first calls, which a capture forbids

    @torch.inference_mode()
    def prepare(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.prepare`. Everything happens on the model's device, whichever one is current."""
        if variant in self._programs:
            return
        tokens = _tokens(generation).clone()
        begin = generation.cache.layers[0].cumulative_length.clone()
        with torch.cuda.device(tokens.device):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self._WARMUP_STEPS):
                    self._fixed_step(tokens, generation.cache)
                    self._set(generation.cache, begin)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # torch's own capture stream belongs to the device of the first capture in this process.
            with torch.cuda.graph(graph, stream=stream):
                tokens.copy_(self._fixed_step(tokens, generation.cache))
            self._set(generation.cache, begin)  # a capture runs nothing, but the cache's Python state has advanced
        self._programs[variant] = (graph, tokens)

    @torch.inference_mode()
    def step(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.step`."""
        graph, tokens = self._programs[variant]
        if generation.next_tokens is not tokens:
            tokens.copy_(_tokens(generation))  # the first step after a prefill
            generation.next_tokens = tokens
        graph.replay()

    @staticmethod
    def _set(cache: Any, position: Tensor) -> None:
        for layer in cache.layers:
            layer.cumulative_length.copy_(position)


def _tokens(generation: Generation) -> Tensor:
    assert generation.next_tokens is not None  # noqa: S101 - prefilled
    return generation.next_tokens
