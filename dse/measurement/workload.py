"""The measured work: one real generation on random tokens, split into prefill and decode steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dse.errors import ConfigError, InvalidMeasurementError
from dse.measurement.clock import synchronize
from dse.measurement.execution import EagerExecution, Execution, Generation, Variant, copy_of
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.modes import EXECUTIONS, require_mode, require_static_decode

__all__ = ["Workload", "check_workload"]

_SPECIAL_TOKENS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")


class Workload:
    """One prompt that can be run through a resident model repeatedly.

    Args:
        model: A Hugging Face model in eval mode on its device or devices.
        spec: Lengths, batch size, mode and seed.

    Attributes:
        decodes: Whether the model generates with a key-value cache; encoders do not, and have no decode phase.
        devices: Every device that holds a parameter, in order of first occurrence.

    Raises:
        ConfigError: The prompt exceeds the model's context, the model is an encoder-decoder, or the mode is not
            available.
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
        can_generate = getattr(model, "can_generate", None)
        may_decode = "past_key_values" in accepted and callable(can_generate) and bool(can_generate())
        _check_context(model, spec, decodes=may_decode)
        options: dict[str, Any] = {"use_cache": True} if may_decode else {}
        if may_decode and "logits_to_keep" in accepted:
            # Generation needs the last position only; logits of all positions would dominate prefill.
            options["logits_to_keep"] = 1
        self.prompt = _random_prompt(model, spec)
        # A BERT with a language-model head claims to generate but returns no cache; only a forward pass can tell.
        probe = EagerExecution(model, self.prompt[:1, :1], 1, options)
        first = probe.begin("baseline")
        probe.prefill(first)
        self.decodes = first.cache is not None
        require_mode(spec.mode, self.devices, decodes=self.decodes)
        if spec.mode != EagerExecution.mode:
            require_static_decode(spec.mode, model, self.prompt, spec.new_tokens, options)
        self._execution: Execution = EXECUTIONS[spec.mode](model, self.prompt, spec.new_tokens, options)

    def begin(self, variant: Variant = "baseline") -> Generation:
        """An empty generation with the weights that are in the model now, which must be those of `variant`."""
        return self._execution.begin(variant)

    def prefill(self, generation: Generation) -> None:
        """Run the whole prompt in one pass. Prefill is compute-bound: each weight serves every token."""
        self._execution.prefill(generation)

    def prepare(self, generation: Generation, variant: Variant = "baseline") -> None:
        """Compile or capture the decode step of `variant` on first use; the prefilled `generation` stays unchanged."""
        if self.decodes:
            self._execution.prepare(variant, generation)

    def step(self, generation: Generation, variant: Variant = "baseline") -> None:
        """Decode one token of each sequence greedily.

        At small batch sizes decode is bound by memory bandwidth: each step reads every weight for one token per
        sequence.
        """
        self._execution.step(variant, generation)

    def decode(self, generation: Generation, variant: Variant = "baseline") -> None:
        """Take `new_tokens` greedy steps, which fills the cache of `generation`."""
        for _ in range(self._spec.new_tokens):
            self._execution.step(variant, generation)

    def decode_again(self, generation: Generation, variant: Variant = "baseline") -> None:
        """Like `decode`, but restore `generation` afterwards, so that one window can repeat decode alone.

        The cache is rewound if possible, which costs nothing; otherwise a copy of it is filled every time.

        Raises:
            InvalidMeasurementError: The cache can be neither rewound nor copied in this mode.
        """
        if generation.cannot_rewind:
            self.decode(copy_of(generation), variant)
            return
        first_tokens = None if generation.next_tokens is None else generation.next_tokens.clone()
        is_first_try = generation.cannot_rewind is None and self._spec.mode == EagerExecution.mode
        saved = copy_of(generation) if is_first_try else None
        self.decode(generation, variant)
        generation.cannot_rewind = not self._execution.rewind(generation, first_tokens)
        if generation.cannot_rewind:
            if saved is None:
                raise InvalidMeasurementError(
                    f"decode must be repeatable to measure its energy, but this cache cannot be rewound in mode "
                    f"{self._spec.mode}; use mode eager"
                )
            generation.next_tokens, generation.cache = saved.next_tokens, saved.cache

    def synchronize(self) -> None:
        """Wait for the model's devices."""
        synchronize(self.devices)


def check_workload(model: nn.Module, spec: LatencySpec) -> None:
    """Check that a model can be measured, by running one token of one sequence; one prompt if the mode is not eager.

    Raises:
        ConfigError: The prompt exceeds the model's context, or the mode is not available.
    """
    Workload(model, spec)


def _check_context(model: nn.Module, spec: LatencySpec, *, decodes: bool) -> None:
    """Raise `ConfigError` if prompt and new tokens exceed the model's context."""
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return
    for name, module in model.named_modules():
        # RoBERTa numbers positions from its padding index on, so the first rows are never used.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= int(module.padding_idx) + 1
    needed = spec.prompt_tokens + (spec.new_tokens if decodes else 0)
    if needed > positions:
        rule, got = ("prompt_tokens", f"prompt_tokens={spec.prompt_tokens}")
        if decodes:
            rule, got = ("prompt_tokens + new_tokens", f"{spec.prompt_tokens} + {spec.new_tokens}")
        raise ConfigError(
            f"`{rule} <= {positions}` must hold for {type(model).__name__} (its context length), but got {got}; "
            f"use a shorter prompt"
        )


def _random_prompt(model: nn.Module, spec: LatencySpec) -> Tensor:
    """Seeded token ids, (batch, prompt), drawn uniformly from the ordinary vocabulary, on the embedding's device."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = min(int(getattr(_text_config(model), "vocab_size", None) or 2**62), embedding.weight.shape[0])
    is_ordinary = torch.ones(vocabulary, dtype=torch.bool)
    special = [token for token in _special_ids(model) if 0 <= token < vocabulary]
    is_ordinary[torch.tensor(special, dtype=torch.long)] = False
    allowed = is_ordinary.nonzero().squeeze(1)
    if not len(allowed):
        raise ConfigError(
            f"the vocabulary must have ordinary tokens, but all {vocabulary} ids are special; check the model's config"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    picks = torch.randint(len(allowed), (spec.batch_size, spec.prompt_tokens), generator=generator)
    return allowed[picks].to(embedding.weight.device)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    # Multimodal models keep the sizes of the language part one level down.
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _special_ids(model: nn.Module) -> Iterator[int]:
    for config in (_text_config(model), getattr(model, "generation_config", None)):
        for name in _SPECIAL_TOKENS:
            value = getattr(config, f"{name}_token_id", None)
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in values if isinstance(item, int))
