from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dse.models import LoadedModel, topology_of


class LetterTokenizer:
    """One token per character: enough for calibration, which only needs `input_ids`."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}


def loaded(model: torch.nn.Module) -> LoadedModel:
    model.eval().requires_grad_(False)
    return LoadedModel(
        "test", None, model, LetterTokenizer(), topology_of(model), torch.device("cpu"), torch.float32  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def llama() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return loaded(LlamaForCausalLM(config))


@pytest.fixture
def gpt2() -> LoadedModel:
    torch.manual_seed(0)
    return loaded(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)))
