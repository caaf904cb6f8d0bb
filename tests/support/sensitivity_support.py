"""Tiny models and token windows for the tests of sensitivity."""

from __future__ import annotations

from functools import partial

import torch
from tiny_models import LetterTokenizer, loaded_tiny_model

from dse.models import LoadedModel


def loaded(family: str, **changes: object) -> LoadedModel:
    """A tiny model whose outputs are far from uniform, and a vocabulary small enough for full distributions."""
    settings = {"vocab_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3, **changes}
    return loaded_tiny_model(family, tokenizer=LetterTokenizer(), **settings)


def llama(layers: int = 4) -> LoadedModel:
    return loaded("llama", num_hidden_layers=layers)


FAMILIES = {
    "llama": llama,
    "gpt2": partial(loaded, "gpt2", n_inner=None),
    # Caps its logits, and its layers alternate between sliding-window and full attention.
    "gemma2": partial(loaded, "gemma2", num_hidden_layers=4, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
}


def windows(count: int = 6, tokens: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (count, tokens), generator=torch.Generator().manual_seed(seed))
