"""The work that is measured: one real generation on random tokens, split into prefill and decode steps."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from dse.errors import ConfigError, InvalidMeasurementError
from dse.measurement.clock import synchronize
from dse.measurement.execution import EagerExecution, Execution, Generation, copy_of
from dse.measurement.executions import EXECUTIONS
from dse.measurement.modes import refuse_unavailable_mode
from dse.measurement.prompt import random_prompt, refuse_long_prompt
from dse.measurement.spec import LatencySpec

__all__ = ["Generation", "LatencySpec", "Workload", "check_workload"]


class Workload:
    """One prompt, ready to run through a resident model again and again.

    Args:
        model: A Hugging Face model in eval mode on its device or devices.
        spec: Lengths, batch, mode and seed.

    Attributes:
        decodes: Whether the model generates with a key-value cache; encoders do not, and have no decode phase.
        devices: Every device that holds a parameter, in the order met.

    Raises:
        ConfigError: The prompt does not fit the model's context, the model is an encoder-decoder, or the mode cannot be
            had here.
    """

    def __init__(self, model: nn.Module, spec: LatencySpec) -> None:
        self._spec = spec
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"encoder-decoder models cannot be measured, but got {type(model).__name__}; use a decoder"
            )
        self.devices = tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
        accepted = inspect.signature(model.forward).parameters
        may_decode = "past_key_values" in accepted and _can_generate(model)
        refuse_long_prompt(model, spec, decodes=may_decode)
        options: dict[str, Any] = {"use_cache": True} if may_decode else {}
        if may_decode and "logits_to_keep" in accepted:
            # Generation needs the last position only; all of them would charge prefill for a huge product.
            options["logits_to_keep"] = 1
        self.prompt = random_prompt(model, spec)
        # A BERT with a language-model head claims to generate, but hands no cache back: only a pass can tell.
        probe = EagerExecution(model, self.prompt[:1, :1], 1, options)
        first = probe.begin("dense")
        probe.prefill(first)
        self.decodes = first.cache is not None
        refuse_unavailable_mode(spec.mode, self.devices, decodes=self.decodes)
        self._execution: Execution = EXECUTIONS[spec.mode](model, self.prompt, spec.new_tokens, options)

    def begin(self, side: str = "dense") -> Generation:
        """An empty generation with the weights that are in the model now, which are those of `side`."""
        return self._execution.begin(side)

    def prefill(self, generation: Generation) -> None:
        """Run the whole prompt in one pass. Prefill is bound by arithmetic: each weight serves every token."""
        self._execution.prefill(generation)

    def get_ready(self, generation: Generation, side: str = "dense") -> None:
        """Compile or capture what decode steps of `side` need, once; `generation` is prefilled and stays as it was."""
        if self.decodes:
            self._execution.get_ready(side, generation)

    def adopt(self, other: Workload, side: str = "dense") -> None:
        """Take over what `other`, of the same model and spec, has compiled for `side`, whose weights must be the same.

        One side stays the same from point to point, and compiling takes a minute for a phase.
        """
        self._execution.adopt(other._execution, side)

    def step(self, generation: Generation, side: str = "dense") -> None:
        """Take one greedy step: one token for each sequence.

        Decode is bound by memory bandwidth at small batch: each step reads every weight for one token a sequence.
        """
        self._execution.step(side, generation)

    def decode(self, generation: Generation, side: str = "dense") -> None:
        """Take `new_tokens` greedy steps; fills the cache of `generation`."""
        for _ in range(self._spec.new_tokens):
            self._execution.step(side, generation)

    def decode_again(self, generation: Generation, side: str = "dense") -> None:
        """Like `decode`, but leave `generation` as it was, so that decode alone can be repeated within one window.

        The cache is taken back where it can be (no cost), else a copy is filled (one copy of the cache each time).

        Raises:
            InvalidMeasurementError: The cache can be neither taken back nor copied in this mode.
        """
        if generation.forgets:
            self.decode(copy_of(generation), side)
            return
        first_tokens = None if generation.next_tokens is None else generation.next_tokens.clone()
        kept = copy_of(generation) if generation.forgets is None and self._spec.mode == EagerExecution.mode else None
        self.decode(generation, side)
        generation.forgets = not self._execution.rewind(generation, first_tokens)
        if generation.forgets:
            if kept is None:
                raise InvalidMeasurementError(
                    f"decode must be repeatable to be metered, but this cache cannot go back in mode {self._spec.mode}"
                )
            generation.next_tokens, generation.cache = kept.next_tokens, kept.cache

    def synchronize(self) -> None:
        """Wait for the model's devices."""
        synchronize(self.devices)


def check_workload(model: nn.Module, spec: LatencySpec) -> None:
    """Refuse what cannot be measured, before anything large is run: a pass of one token of one sequence is.

    Raises:
        ConfigError: The prompt does not fit the model's context, or the mode cannot be had here.
    """
    Workload(model, spec)


def _can_generate(model: nn.Module) -> bool:
    probe = getattr(model, "can_generate", None)
    return bool(probe()) if callable(probe) else False
