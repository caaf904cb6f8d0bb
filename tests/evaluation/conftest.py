from __future__ import annotations

from pathlib import Path

import datasets.config
import pytest
from evaluation_support import TaskWriter, byte_tokenizer, task_writer, tiny_llama

from dse.models import LoadedModel


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the datasets of these tests out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def loaded() -> LoadedModel:
    return tiny_llama(byte_tokenizer())


@pytest.fixture
def write_task(tmp_path: Path) -> TaskWriter:
    return task_writer(tmp_path)
