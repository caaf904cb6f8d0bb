from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_model, word_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(("the", "cat", "dog", "sees", "a", "runs", "."))


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=16, tie_word_embeddings=True)


@pytest.fixture
def llama_folder(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A complete local folder: config, safetensors and tokenizer."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
