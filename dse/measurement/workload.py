"""The work that is measured: one real generation on random tokens, split into prefill and decode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dse.errors import ConfigError
from dse.measurement.clock import synchronize

__all__ = ["LatencySpec", "Prefilled", "Workload"]

_LOWEST = {"blocks": 2, "warmup_blocks": 0, "seed": 0}
_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")


@dataclass(frozen=True)
class LatencySpec:
    """How a model is measured.

    Attributes:
        prompt_tokens: Length of the prompt, the same for every sequence of the batch.
        new_tokens: Greedy decode steps after the prompt; encoders have none.
        batch_size: Sequences side by side.
        blocks: Counted ABBA blocks (subject, dense, dense, subject); each gives two pairs. At least 2, because fewer
            than four pairs give no interval.
        warmup_blocks: ABBA blocks that are run first and not counted.
        seed: Seed of the prompt's tokens and of the bootstrap.

    Raises:
        ConfigError: A number is not an integer or too low.
    """

    prompt_tokens: int = 128
    new_tokens: int = 16
    batch_size: int = 1
    blocks: int = 4
    warmup_blocks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, lowest = getattr(self, field.name), _LOWEST.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigError(
                    f"`{field.name} >= {lowest}` must hold for a measurement, but got {field.name}={value!r}; "
                    f"give an integer of at least {lowest}"
                )


@dataclass
class Prefilled:
    """State after the prompt: the next token of each sequence, (batch, 1), and the cache; both None for encoders."""

    next_tokens: Tensor | None
    cache: Any


class Workload:
    """One prompt, ready to run through a resident model again and again.

    Args:
        model: A Hugging Face model in eval mode on its device or devices.
        spec: Lengths, batch and seed.

    Attributes:
        decodes: Whether the model generates with a key-value cache; encoders do not, and have no decode phase.
        devices: Every device that holds a parameter, in the order met.

    Raises:
        ConfigError: The prompt does not fit the model's context, or the model is an encoder-decoder.
    """

    def __init__(self, model: nn.Module, spec: LatencySpec) -> None:
        self._model: Any = model
        self._spec = spec
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"encoder-decoder models cannot be measured, but got {type(model).__name__}; use a decoder"
            )
        self.devices = tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
        accepted = inspect.signature(model.forward).parameters
        may_decode = "past_key_values" in accepted and _can_generate(model)
        _refuse_long_prompt(model, spec, decodes=may_decode)
        self._options: dict[str, Any] = {"use_cache": True} if may_decode else {}
        if may_decode and "logits_to_keep" in accepted:
            # Generation needs the last position only; all of them would charge prefill for a huge product.
            self._options["logits_to_keep"] = 1
        self.prompt = _random_prompt(model, spec)
        # A BERT with a language-model head claims to generate, but hands no cache back: only a pass can tell.
        self.decodes = may_decode
        self.decodes = self._forward(self.prompt[:, :1], None).cache is not None
        self._can_crop: bool | None = None

    def settle(self) -> None:
        """Run one token through the model, so that weights just swapped in have been touched once."""
        self._forward(self.prompt[:, :1], None)

    def prefill(self) -> Prefilled:
        """Run the whole prompt in one pass. Prefill is bound by arithmetic: each weight serves every token."""
        return self._forward(self.prompt, None)

    def decode(self, state: Prefilled) -> None:
        """Take `new_tokens` greedy steps of one token each; fills the cache of `state`.

        Decode is bound by memory bandwidth at small batch: each step reads every weight for one token a sequence.
        """
        tokens, cache = state.next_tokens, state.cache
        for _ in range(self._spec.new_tokens):
            stepped = self._forward(tokens, cache)
            tokens, cache = stepped.next_tokens, stepped.cache

    def decode_again(self, state: Prefilled) -> None:
        """Like `decode`, but leave `state` as it was, so that decode alone can be repeated within one window.

        The cache is cropped back where it can be (no cost), else a copy is filled (one copy of the cache each time).
        """
        if self._can_crop is None:
            self._can_crop = self._crops(copy.deepcopy(state))
        if self._can_crop:
            self.decode(state)
            state.cache.crop(-self._spec.new_tokens)
        else:
            self.decode(Prefilled(state.next_tokens, copy.deepcopy(state.cache)))

    def synchronize(self) -> None:
        """Wait for the model's devices."""
        synchronize(self.devices)

    def _crops(self, state: Prefilled) -> bool:
        """Whether cropping a decoded cache brings its length back; caches that forget (sliding window) cannot."""
        before = state.cache.get_seq_length()
        self.decode(state)
        try:
            state.cache.crop(-self._spec.new_tokens)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return False
        return bool(state.cache.get_seq_length() == before)

    @torch.inference_mode()
    def _forward(self, tokens: Tensor | None, cache: Any) -> Prefilled:
        if not self._options:
            self._model(input_ids=tokens)
            return Prefilled(None, None)
        output = self._model(input_ids=tokens, past_key_values=cache, **self._options)
        filled = getattr(output, "past_key_values", None)
        if filled is None:
            return Prefilled(None, None)
        return Prefilled(output.logits[:, -1:].argmax(dim=-1), filled)


def _can_generate(model: nn.Module) -> bool:
    probe = getattr(model, "can_generate", None)
    return bool(probe()) if callable(probe) else False


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    # Models of several modalities keep the language part's numbers one level down.
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _refuse_long_prompt(model: nn.Module, spec: LatencySpec, *, decodes: bool) -> None:
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return
    for name, module in model.named_modules():
        # RoBERTa numbers positions from its padding index on, so that many rows at the start are never used.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= int(module.padding_idx) + 1
    needed = spec.prompt_tokens + (spec.new_tokens if decodes else 0)
    if needed > positions:
        rule, got = ("prompt_tokens", f"prompt_tokens={spec.prompt_tokens}")
        if decodes:
            rule, got = ("prompt_tokens + new_tokens", f"{spec.prompt_tokens} + {spec.new_tokens}")
        raise ConfigError(
            f"`{rule} <= {positions}` must hold for {type(model).__name__} (its context), but got {got}; "
            f"ask for a shorter prompt"
        )


def _special_ids(model: nn.Module) -> Iterator[int]:
    for config in (_text_config(model), getattr(model, "generation_config", None)):
        for name in _SPECIAL:
            value = getattr(config, f"{name}_token_id", None)
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in values if isinstance(item, int))


def _random_prompt(model: nn.Module, spec: LatencySpec) -> Tensor:
    """Seeded token ids, (batch, prompt), drawn evenly from the ordinary vocabulary, on the embedding's device."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = min(int(getattr(_text_config(model), "vocab_size", None) or 2**62), embedding.weight.shape[0])
    ordinary = torch.ones(vocabulary, dtype=torch.bool)
    special = [token for token in _special_ids(model) if 0 <= token < vocabulary]
    ordinary[torch.tensor(special, dtype=torch.long)] = False
    allowed = ordinary.nonzero().squeeze(1)
    if not len(allowed):
        raise ConfigError(
            f"the vocabulary must hold ordinary tokens, but all {vocabulary} ids are special; check the config"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    picks = torch.randint(len(allowed), (spec.batch_size, spec.prompt_tokens), generator=generator)
    return allowed[picks].to(embedding.weight.device)
