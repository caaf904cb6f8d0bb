from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
from evaluation_support import TaskWriter, byte_tokenizer, task_writer, tiny_llama

from dse.evaluation import hub_access
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


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without hub access and with an empty hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    hub_access._is_hub_reachable.cache_clear()
    yield
    hub_access._is_hub_reachable.cache_clear()
