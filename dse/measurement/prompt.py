"""The prompt that is measured: seeded random tokens, and whether it fits the model's context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dse.errors import ConfigError
from dse.measurement.spec import LatencySpec

__all__ = ["random_prompt", "refuse_long_prompt"]

_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")


def refuse_long_prompt(model: nn.Module, spec: LatencySpec, *, decodes: bool) -> None:
    """Check that prompt and new tokens fit the model's context.

    Raises:
        ConfigError: They do not.
    """
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


def random_prompt(model: nn.Module, spec: LatencySpec) -> Tensor:
    """Seeded token ids, (batch, prompt), drawn evenly from the ordinary vocabulary, on the embedding's device.

    Raises:
        ConfigError: The vocabulary holds nothing but special tokens.
    """
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


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    # Models of several modalities keep the language part's numbers one level down.
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _special_ids(model: nn.Module) -> Iterator[int]:
    for config in (_text_config(model), getattr(model, "generation_config", None)):
        for name in _SPECIAL:
            value = getattr(config, f"{name}_token_id", None)
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in values if isinstance(item, int))
