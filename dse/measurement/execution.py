"""How a generation is run: eagerly with a growing cache, or with a static cache whose decode step is one fixed program.

Prefill runs eagerly in every mode, as in Hugging Face's own `generate`: it is bound by arithmetic, and a program fixed
to one prompt length would serve no other. What modes change is the decode step, which is bound by memory bandwidth and,
where layers are small, by the cost of launching kernels.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dse.errors import InvalidMeasurementError

__all__ = [
    "CompiledExecution",
    "CudaGraphExecution",
    "EagerExecution",
    "Execution",
    "Generation",
    "StaticExecution",
    "copy_of",
]


@dataclass
class Generation:
    """A generation under way.

    Attributes:
        next_tokens: The next token of each sequence, (batch, 1); None before prefill, and for encoders.
        cache: The key-value cache; None likewise.
        forgets: Whether the cache cannot be taken back (a sliding window); None while nobody has tried.
        side: Whose weights it was begun with.
    """

    next_tokens: Tensor | None
    cache: Any
    forgets: bool | None = None
    side: str = "dense"


class Execution(ABC):
    """Runs one model on one prompt.

    Args:
        model: A Hugging Face model in eval mode.
        prompt: Token ids, (batch, prompt).
        new_tokens: Most decode steps of a generation.
        options: Keyword arguments of every forward pass; empty for models without a cache.
    """

    mode: ClassVar[str]

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        self._model: Any = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        self._options = dict(options)

    @abstractmethod
    def begin(self, side: str) -> Generation:
        """An empty generation with the weights of `side` ("subject" or "dense"), not yet prefilled."""

    @abstractmethod
    def prefill(self, generation: Generation) -> None:
        """Run the whole prompt in one pass and fill the cache of `generation`."""

    def get_ready(self, side: str, generation: Generation) -> None:  # noqa: B027 - most modes need nothing
        """Build, once for a side, what its decode steps need; leaves `generation` as it was."""

    def adopt(self, other: Execution, side: str) -> None:  # noqa: B027 - most modes keep nothing for a side
        """Take over what `other`, of the same model, prompt and mode, has built for `side`."""

    @abstractmethod
    def step(self, side: str, generation: Generation) -> None:
        """Take one greedy step of one token for each sequence."""

    @abstractmethod
    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """Take `new_tokens` steps back, so that decoding can be repeated; False where the cache forgets."""

    @torch.inference_mode()
    def _forward(self, tokens: Tensor | None, cache: Any, **more: Any) -> Generation:
        if not self._options:
            self._model(input_ids=tokens)
            return Generation(None, None)
        output = self._model(input_ids=tokens, past_key_values=cache, **self._options, **more)
        filled = getattr(output, "past_key_values", None)
        if filled is None:
            return Generation(None, None)
        return Generation(output.logits[:, -1:].argmax(dim=-1), filled)


class EagerExecution(Execution):
    """Kernel by kernel, with the model's own growing cache."""

    mode = "eager"

    def begin(self, side: str) -> Generation:
        """See `Execution.begin`."""
        return Generation(None, None)

    def prefill(self, generation: Generation) -> None:
        """See `Execution.prefill`."""
        filled = self._forward(self._prompt, None)
        generation.next_tokens, generation.cache = filled.next_tokens, filled.cache

    def step(self, side: str, generation: Generation) -> None:
        """See `Execution.step`."""
        stepped = self._forward(generation.next_tokens, generation.cache)
        generation.next_tokens, generation.cache = stepped.next_tokens, stepped.cache

    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """See `Execution.rewind`; caches that forget (sliding window) cannot."""
        before = generation.cache.get_seq_length()
        try:
            generation.cache.crop(-self._new_tokens)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return False
        generation.next_tokens = first_tokens
        return bool(generation.cache.get_seq_length() == before - self._new_tokens)


class StaticExecution(Execution):
    """One cache of fixed size a side; position and mask are tensors, so that every decode step is the same program."""

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, new_tokens, options)
        self._length = prompt.shape[1] + new_tokens
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._columns = torch.arange(self._length, device=prompt.device)
        self._caches: dict[str, Any] = {}

    @torch.inference_mode()
    def begin(self, side: str) -> Generation:
        """See `Execution.begin`. The side's one cache starts anew: a new one would be a new program."""
        from transformers import StaticCache

        if side not in self._caches:
            cache = StaticCache(config=self._model.config, max_cache_len=self._length)
            if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
                raise InvalidMeasurementError(
                    f"a static cache must keep every position, but {type(self._model).__name__} has layers with a "
                    f"sliding window; use mode eager"
                )
            self._caches[side] = cache
        self._caches[side].reset()
        return Generation(None, self._caches[side])

    def prefill(self, generation: Generation) -> None:
        """See `Execution.prefill`."""
        generation.next_tokens = self._forward(self._prompt, generation.cache).next_tokens

    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """See `Execution.rewind`; what lies behind the position is masked and overwritten."""
        self._move(generation.cache, -self._new_tokens)
        generation.next_tokens = first_tokens
        return True

    def _fixed_step(self, tokens: Tensor, cache: Any) -> Tensor:
        """The program of one decode step: (batch, 1) tokens in, the next ones out; the cache advances in place."""
        position = cache.layers[0].cumulative_length
        hidden = torch.finfo(self._model.dtype).min
        # Additive, so that every attention implementation takes it: 0 up to the position, the lowest number after it.
        mask = torch.where(self._columns <= position, 0.0, hidden).to(self._model.dtype)
        more: dict[str, Any] = {"attention_mask": mask.expand(tokens.shape[0], 1, 1, -1)}
        if self._takes_positions:
            more["position_ids"] = position.expand(tokens.shape[0], 1)
        output = self._model(input_ids=tokens, past_key_values=cache, **self._options, **more)
        next_tokens: Tensor = output.logits[:, -1:].argmax(dim=-1)
        return next_tokens

    @staticmethod
    @torch.inference_mode()
    def _move(cache: Any, tokens: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.add_(tokens)


class CompiledExecution(StaticExecution):
    """The decode step by `torch.compile`, once for each side."""

    mode = "compile"

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, new_tokens, options)
        self._steps: dict[str, Callable[[Tensor, Any], Tensor]] = {}

    def get_ready(self, side: str, generation: Generation) -> None:
        """See `Execution.get_ready`; compiling takes from seconds to minutes."""
        if side in self._steps:
            return
        if not self._steps:
            torch._dynamo.reset()  # programs of points that are gone would fill its cache
        # A function of its own for each side: two programs of one function would be told apart at every step.
        self._steps[side] = torch.compile(lambda tokens, cache: self._fixed_step(tokens, cache), dynamic=False)
        assert generation.next_tokens is not None  # noqa: S101 - prefilled
        first = generation.next_tokens
        self.step(side, generation)
        generation.next_tokens = first
        self._move(generation.cache, -1)

    @torch.inference_mode()
    def step(self, side: str, generation: Generation) -> None:
        """See `Execution.step`."""
        assert generation.next_tokens is not None  # noqa: S101 - prefilled
        generation.next_tokens = self._steps[side](generation.next_tokens, generation.cache)


class CudaGraphExecution(StaticExecution):
    """The decode step captured as a CUDA graph, once for each side: one launch a token."""

    mode = "cuda_graph"
    _WARMUP_STEPS = 3  # libraries choose algorithms and allocate workspaces in the first calls, which a capture forbids

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, new_tokens, options)
        self._graphs: dict[str, tuple[Any, Tensor]] = {}

    @torch.inference_mode()
    def get_ready(self, side: str, generation: Generation) -> None:
        """See `Execution.get_ready`."""
        if side in self._graphs:
            return
        assert generation.next_tokens is not None  # noqa: S101 - prefilled
        tokens = generation.next_tokens.clone()
        begin = generation.cache.layers[0].cumulative_length.clone()
        stream: Any = torch.cuda.Stream(tokens.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(self._WARMUP_STEPS):
                self._fixed_step(tokens, generation.cache)
                self._set(generation.cache, begin)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens.copy_(self._fixed_step(tokens, generation.cache))
        self._set(generation.cache, begin)  # capturing ran nothing, but Python-side views must start where they did
        self._graphs[side] = (graph, tokens)

    @torch.inference_mode()
    def step(self, side: str, generation: Generation) -> None:
        """See `Execution.step`."""
        graph, tokens = self._graphs[side]
        if generation.next_tokens is not tokens:
            assert generation.next_tokens is not None  # noqa: S101 - prefilled
            tokens.copy_(generation.next_tokens)  # the first step after a prefill
            generation.next_tokens = tokens
        graph.replay()

    @staticmethod
    def _set(cache: Any, position: Tensor) -> None:
        for layer in cache.layers:
            layer.cumulative_length.copy_(position)


def copy_of(generation: Generation) -> Generation:
    """A generation with a cache of its own."""
    return Generation(generation.next_tokens, copy.deepcopy(generation.cache), side=generation.side)
