"""The fastest way to run a generation here: prefill and decode step each one compiled program over a static cache.

Beside `compile` it compiles prefill too, does not repeat the cache for query heads that share it, and drops the checks
that `torch.compile` makes before every call: they walk every weight, which at batch 1 is a twentieth of a step, and
here nothing they check can change. The weights' own layout is the caller's: `dse.runtime` puts it into the model, and
where it lets the kernel run whole layers, a step is one call in a small program, and prefill needs none.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dse.kernel import runs_in_kernel
from dse.measurement.attention import grouped_attention_in_use
from dse.measurement.execution import Execution, Generation, StaticExecution

__all__ = ["FastExecution"]

Program = Callable[[Tensor, Any], Tensor]


class FastExecution(StaticExecution):
    """Prefill and decode step compiled, once for each side; prefill only where layers are not the kernel's."""

    mode = "fast"

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, new_tokens, options)
        self._programs: dict[tuple[str, str], Program] = {}

    @torch.inference_mode()
    def begin(self, side: str) -> Generation:
        """See `Execution.begin`; compiles the prefill of `side` the first time, which may take a minute."""
        generation = super().begin(side)
        if ("prefill", side) not in self._programs:
            # A cache allocates itself in its first pass, and would do so inside the program.
            super().prefill(generation)
            generation = super().begin(side)
            program: Program = lambda tokens, cache: self._pass(tokens, cache)  # noqa: E731 - a code object of its own
            # Where layers are the kernel's, nothing is left to be gained by compiling.
            self._programs["prefill", side] = program if runs_in_kernel(self._model) else _compiled(program, side)
            generation.side = side
            self.prefill(generation)
            generation = super().begin(side)
        generation.side = side
        return generation

    @torch.inference_mode()
    def prefill(self, generation: Generation) -> None:
        """See `Execution.prefill`."""
        program = self._programs["prefill", generation.side]
        generation.next_tokens = program(self._prompt, generation.cache)

    def adopt(self, other: Execution, side: str) -> None:
        """See `Execution.adopt`: its programs, and the cache that they were compiled with."""
        assert isinstance(other, FastExecution)  # noqa: S101 - of the same mode
        self._programs.update({key: program for key, program in other._programs.items() if key[1] == side})
        if side in other._caches:
            self._caches[side] = other._caches[side]

    def get_ready(self, side: str, generation: Generation) -> None:
        """See `Execution.get_ready`; compiling takes up to a minute."""
        if ("step", side) in self._programs:
            return
        self._programs["step", side] = _compiled(lambda tokens, cache: self._fixed_step(tokens, cache), side)
        first = generation.next_tokens
        with grouped_attention_in_use(self._model):
            self.step(side, generation)
        generation.next_tokens = first
        self._move(generation.cache, -1)

    @torch.inference_mode()
    def step(self, side: str, generation: Generation) -> None:
        """See `Execution.step`."""
        assert generation.next_tokens is not None  # noqa: S101 - prefilled
        generation.next_tokens = self._programs["step", side](generation.next_tokens, generation.cache)

    def _pass(self, tokens: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens, past_key_values=cache, **self._options).logits
        return logits[:, -1:].argmax(dim=-1)


def _compiled(function: Program, side: str) -> Program:
    """`function` as a program of its own, which is only ever called with what it was compiled for.

    Programs are kept by code object and told apart by the checks that are dropped here, so each needs its own.
    """
    assert isinstance(function, types.FunctionType)  # noqa: S101 - narrows the type
    code = function.__code__.replace(co_name=f"{function.__name__}_{side}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    options: dict[str, Any] = {"size_asserts": False}  # shapes cannot change here either
    skip_checks = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # torch 2.9
    if skip_checks is not None:
        options["guard_filter_fn"] = skip_checks
    return torch.compile(own, dynamic=False, options=options)
