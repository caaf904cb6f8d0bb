from __future__ import annotations

import pytest
from tiny_models import LetterTokenizer, loaded_tiny_model

from dse.models import LoadedModel

SIZES = {"vocab_size": 64, "max_position_embeddings": 128, "tokenizer": LetterTokenizer()}


@pytest.fixture
def llama() -> LoadedModel:
    return loaded_tiny_model("llama", **SIZES)


@pytest.fixture
def gpt2() -> LoadedModel:
    return loaded_tiny_model("gpt2", num_hidden_layers=2, n_inner=None, **SIZES)
