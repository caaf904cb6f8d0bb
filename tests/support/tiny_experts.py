"""Tiny random mixtures of experts."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tiny_study import save_tiny_model

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_mixtral(**changes: object) -> hf.MixtralForCausalLM:
    """4 experts, 2 a token; gate_up 4 x 96 x 32, down 4 x 32 x 48."""
    torch.manual_seed(0)
    config = {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, **changes}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**config)).eval().requires_grad_(False)


def tiny_qwen3_moe(**changes: object) -> hf.Qwen3MoeForCausalLM:
    """6 experts, 3 a token; gate_up 6 x 48 x 32, down 6 x 32 x 24."""
    torch.manual_seed(0)
    own = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "pad_token_id": 0}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**COMMON, **own, **changes})).eval().requires_grad_(False)


TINY_EXPERTS = {"Mixtral": tiny_mixtral, "Qwen3Moe": tiny_qwen3_moe}


def save_tiny_experts(folder: Path, family: str) -> Path:
    """Such a model with the tokenizer of `tiny_study`, in a folder."""
    save_tiny_model(folder)
    vocabulary = hf.AutoTokenizer.from_pretrained(folder).vocab_size
    TINY_EXPERTS[family](vocab_size=vocabulary).save_pretrained(folder)
    return folder


EXPERT_ROLES = ["expert_gate_up", "expert_down"]
