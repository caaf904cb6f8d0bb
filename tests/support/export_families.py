"""Tiny families whose exports are loaded again by transformers alone."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from dse.models.transformers_patches import quiet_transformers

FAMILIES = {
    "llama": hf.AutoModelForCausalLM,
    "phi3": hf.AutoModelForCausalLM,
    "gpt2": hf.AutoModelForCausalLM,
    "opt": hf.AutoModelForCausalLM,
    "bert": hf.AutoModelForMaskedLM,
}
"""Name in `tiny_models` to the auto class of its exports."""

TOKENS = torch.tensor([[5, 9, 120, 33, 7]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}
"""Arguments of `generate(TOKENS, ...)`."""


def reloaded(family: str, folder: Path, **keywords: object) -> hf.PreTrainedModel:
    """The exported model, as `from_pretrained` with these keywords loads it."""
    with quiet_transformers():
        model: hf.PreTrainedModel = FAMILIES[family].from_pretrained(folder, **keywords).eval()
    return model
