"""Execution modes of a generation: eager with a growing cache, or a static cache with a fixed decode program.

Prefill runs eagerly in every mode, as in Hugging Face's own `generate`: it is compute-bound, and a program compiled for
one prompt length would serve no other. The modes differ in the decode step, which is bound by memory bandwidth and, for
small layers, by the cost of kernel launches.
"""

from __future__ import annotations

import copy
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dse.errors import ConfigError, InvalidMeasurementError

__all__ = [
    "EXECUTIONS",
    "VARIANTS",
    "CompiledExecution",
    "CudaGraphExecution",
    "EagerExecution",
    "Execution",
    "Generation",
    "StaticExecution",
    "Variant",
    "copy_of",
    "mode_problem",
    "require_mode",
]

Variant = Literal["candidate", "baseline"]
"""Which weights are in the resident model: the design point's, or those of the dense model."""
VARIANTS: tuple[Variant, Variant] = ("candidate", "baseline")


@dataclass
class Generation:
    """A generation in progress.

    Attributes:
        next_tokens: The next token of each sequence, (batch, 1); None before prefill and for encoders.
        cache: The key-value cache; None before prefill and for encoders.
        cannot_rewind: Whether the cache drops old positions (sliding window); None until a rewind has been tried.
    """

    next_tokens: Tensor | None
    cache: Any
    cannot_rewind: bool | None = None


class Execution(ABC):
    """Runs one model on one prompt.

    Args:
        model: A Hugging Face model in eval mode.
        prompt: Token ids, (batch, prompt).
        new_tokens: Maximum number of decode steps of a generation.
        options: Keyword arguments of every forward pass; empty for models without a cache.
    """

    mode: ClassVar[str]

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        self._model: Any = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        self._options = dict(options)

    @abstractmethod
    def begin(self, variant: Variant) -> Generation:
        """An empty generation with the weights of `variant`, before prefill."""

    @abstractmethod
    def prefill(self, generation: Generation) -> None:
        """Run the whole prompt in one pass and fill the cache of `generation`."""

    def prepare(self, variant: Variant, generation: Generation) -> None:  # noqa: B027 - most modes need nothing
        """Compile or capture the decode step of `variant` on first use; `generation` stays unchanged."""

    @abstractmethod
    def step(self, variant: Variant, generation: Generation) -> None:
        """Decode one token of each sequence greedily."""

    @abstractmethod
    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """Go `new_tokens` steps back, so that decoding can be repeated; False if the cache cannot."""

    @torch.inference_mode()
    def _forward(self, generation: Generation, tokens: Tensor | None) -> None:
        """Run `tokens` through the model, which extends the cache and gives the next tokens."""
        if not self._options:
            self._model(input_ids=tokens)
            return
        output = self._model(input_ids=tokens, past_key_values=generation.cache, **self._options)
        generation.cache = getattr(output, "past_key_values", None)
        generation.next_tokens = None if generation.cache is None else output.logits[:, -1:].argmax(dim=-1)


class EagerExecution(Execution):
    """Kernel by kernel, with the model's own growing cache."""

    mode = "eager"

    def begin(self, variant: Variant) -> Generation:
        """See `Execution.begin`."""
        return Generation(None, None)

    def prefill(self, generation: Generation) -> None:
        """See `Execution.prefill`."""
        generation.cache = None
        self._forward(generation, self._prompt)

    def step(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.step`."""
        self._forward(generation, generation.next_tokens)

    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """See `Execution.rewind`; caches with a sliding window cannot."""
        before = generation.cache.get_seq_length()
        try:
            generation.cache.crop(-self._new_tokens)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return False
        generation.next_tokens = first_tokens
        return bool(generation.cache.get_seq_length() == before - self._new_tokens)


class StaticExecution(Execution):
    """One cache of fixed size per variant; position and mask are tensors, so every decode step is the same program."""

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, new_tokens, options)
        self._length = prompt.shape[1] + new_tokens
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._columns = torch.arange(self._length, device=prompt.device)
        self._caches: dict[Variant, Any] = {}
        self._programs: dict[Variant, Any] = {}

    @torch.inference_mode()
    def begin(self, variant: Variant) -> Generation:
        """See `Execution.begin`. The variant's cache is reset and reused, because a new one needs a new program."""
        from transformers import StaticCache

        if variant not in self._caches:
            cache = StaticCache(config=self._model.config, max_cache_len=self._length)
            if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
                raise InvalidMeasurementError(
                    f"a static cache must keep every position, but {type(self._model).__name__} has layers with a "
                    f"sliding window; use mode eager"
                )
            self._caches[variant] = cache
        self._caches[variant].reset()
        return Generation(None, self._caches[variant])

    def prefill(self, generation: Generation) -> None:
        """See `Execution.prefill`."""
        self._forward(generation, self._prompt)

    def rewind(self, generation: Generation, first_tokens: Tensor | None) -> bool:
        """See `Execution.rewind`; cache entries after the position are masked and overwritten."""
        self._move(generation.cache, -self._new_tokens)
        generation.next_tokens = first_tokens
        return True

    def _fixed_step(self, tokens: Tensor, cache: Any) -> Tensor:
        """The program of one decode step: (batch, 1) tokens to the next tokens; the cache advances in place."""
        position = cache.layers[0].cumulative_length
        hidden = torch.finfo(self._model.dtype).min
        # Additive mask, which every attention implementation accepts: 0 up to the position, the lowest number after it.
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
    """The decode step compiled by `torch.compile`, once per variant."""

    mode = "compile"

    def prepare(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.prepare`; compiling takes seconds to minutes."""
        if variant in self._programs:
            return
        if not self._programs:
            torch._dynamo.reset()  # otherwise programs of earlier points fill its cache
        # A separate function per variant: with a shared one, torch checks guards at every step to choose a program.
        program: Callable[[Tensor, Any], Tensor] = torch.compile(lambda x, kv: self._fixed_step(x, kv), dynamic=False)
        self._programs[variant] = program
        assert generation.next_tokens is not None  # noqa: S101 - prefilled
        first = generation.next_tokens
        self.step(variant, generation)
        generation.next_tokens = first
        self._move(generation.cache, -1)

    @torch.inference_mode()
    def step(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.step`."""
        assert generation.next_tokens is not None  # noqa: S101 - prefilled
        generation.next_tokens = self._programs[variant](generation.next_tokens, generation.cache)


class CudaGraphExecution(StaticExecution):
    """The decode step captured as a CUDA graph, once per variant: one launch per token."""

    mode = "cuda_graph"
    _WARMUP_STEPS = 3  # libraries pick algorithms and allocate workspaces in their first calls, which a capture forbids

    @torch.inference_mode()
    def prepare(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.prepare`."""
        if variant in self._programs:
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
        self._set(generation.cache, begin)  # a capture runs nothing, but the cache's Python-side state has advanced
        self._programs[variant] = (graph, tokens)

    @torch.inference_mode()
    def step(self, variant: Variant, generation: Generation) -> None:
        """See `Execution.step`."""
        graph, tokens = self._programs[variant]
        if generation.next_tokens is not tokens:
            assert generation.next_tokens is not None  # noqa: S101 - prefilled
            tokens.copy_(generation.next_tokens)  # the first step after a prefill
            generation.next_tokens = tokens
        graph.replay()

    @staticmethod
    def _set(cache: Any, position: Tensor) -> None:
        for layer in cache.layers:
            layer.cumulative_length.copy_(position)


EXECUTIONS: Mapping[str, type[Execution]] = {
    kind.mode: kind for kind in (EagerExecution, CompiledExecution, CudaGraphExecution)
}
"""Execution of each mode. A new mode is a class, a line here, and its name in `dse.measurement.latency_spec.MODES`."""


def copy_of(generation: Generation) -> Generation:
    """A copy of a generation with its own cache."""
    return Generation(generation.next_tokens, copy.deepcopy(generation.cache))


def mode_problem(mode: str, devices: Sequence[torch.device], *, decodes: bool) -> str:
    """Why `mode` cannot run a model on `devices`; "" if it can. Determined by trying it, not by version numbers.

    Args:
        mode: One of `MODES`.
        devices: Every device that holds a parameter.
        decodes: Whether the model generates with a cache.
    """
    if mode == "eager":
        return ""
    if not decodes:
        return "it changes how decode steps run, and this model has none; use eager"
    if len(devices) != 1:
        return f"it needs a model on one device, but this one is on {len(devices)}; use eager"
    if mode == "cuda_graph":
        if devices[0].type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, but the model is on {devices[0]}; use eager or compile"
        return ""
    return _compile_problem(devices[0])


def require_mode(mode: str, devices: Sequence[torch.device], *, decodes: bool) -> None:
    """Check that `mode` is available; see `mode_problem`.

    Raises:
        ConfigError: It is not; the message gives the reason.
    """
    problem = mode_problem(mode, devices, decodes=decodes)
    if problem:
        raise ConfigError(f"measurement mode '{mode}' must be available, but {problem}")


def _compile_problem(device: torch.device) -> str:
    """Compile and run one addition: it needs a compiler, its headers and a writable cache folder."""
    try:
        compiled = torch.compile(lambda x: x + 1, dynamic=False)
        answer = compiled(torch.ones(8, device=device))
        return "" if bool((answer == 2).all()) else "a compiled addition gave a wrong sum; use eager"
    except Exception as error:  # noqa: BLE001 - any error of the compiler stack is the reason
        first = " ".join(str(error).split())[:200]
        need = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        return f"torch.compile does not work here ({type(error).__name__}: {first}); install {need}, or use eager"
