from __future__ import annotations

from pathlib import Path

import pytest
from nvml_library import build_library
from tiny_models import tiny_model
from transformers import PreTrainedModel


@pytest.fixture
def llama() -> PreTrainedModel:
    special = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    return tiny_model("llama", vocab_size=200, num_hidden_layers=2, tie_word_embeddings=True, **special)


@pytest.fixture
def bert() -> PreTrainedModel:
    return tiny_model("bert", num_hidden_layers=2, max_position_embeddings=32)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the scripted NVML library, compiled once."""
    return build_library(tmp_path_factory.mktemp("nvml"))
