"""Tiny models and texts of these tests."""

from __future__ import annotations

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dse.models import LoadedModel, topology_of


class LetterTokenizer:
    """One token per character: enough for calibration, which only needs `input_ids`."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}


def loaded(model: torch.nn.Module) -> LoadedModel:
    model.eval().requires_grad_(False)
    return LoadedModel(
        "tiny", None, model, LetterTokenizer(), topology_of(model), torch.device("cpu"), torch.float32  # type: ignore[arg-type]
    )  # fmt: skip


def llama(layers: int = 4) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return loaded(LlamaForCausalLM(config))


def gpt2() -> LoadedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.3)
    return loaded(GPT2LMHeadModel(config))


def gemma2() -> LoadedModel:
    """Its head bends the logits, and its layers take turns of two kinds of attention."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=4,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    return loaded(Gemma2ForCausalLM(config))


FAMILIES = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2}


def windows(count: int = 6, tokens: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (count, tokens), generator=torch.Generator().manual_seed(seed))
