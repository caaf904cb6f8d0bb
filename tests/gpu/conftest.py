"""Tests that need a CUDA device; without one a single skipped test says so for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if torch.cuda.is_available() or not mine:
        return
    mine[0].add_marker(pytest.mark.skip(reason=f"{len(mine)} tests need a CUDA device"))
    config.hook.pytest_deselected(items=mine[1:])
    items[:] = [item for item in items if item not in mine[1:]]


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda:0")


@pytest.fixture
def second_gpu() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    return torch.device("cuda:1")
