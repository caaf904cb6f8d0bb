"""Fixtures of more than one folder: a tiny model and task on disk, and a study of them that has been run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` and `tiny_choice.yaml`."""
    from tiny_study import save_choice_task, save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model")
    save_choice_task(folder)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factor banks and datasets of these tests, away from the user's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The environment and the datasets library pointed at `cache_folder`."""
    import datasets.config

    monkeypatch.setenv("DSE_CACHE", str(cache_folder / "dse"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
    yield cache_folder
