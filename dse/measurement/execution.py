"""How one generation is executed: the interface of every mode, and mode eager.

Prefill runs eagerly in every mode, as in Hugging Face's own `generate`: it is compute-bound, and a program compiled for
one prompt length would serve no other. The modes differ in the decode step, which is bound by memory bandwidth and, for
small layers, by the cost of kernel launches.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = ["VARIANTS", "EagerExecution", "Execution", "Generation", "Variant", "copy_of"]

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


def copy_of(generation: Generation) -> Generation:
    """A copy of a generation with its own cache."""
    return Generation(generation.next_tokens, copy.deepcopy(generation.cache))
