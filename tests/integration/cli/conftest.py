from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _caches(own_cache: Path, own_process: None) -> None:
    """Commands use the caches of the test session, and their process-wide settings are undone after each test."""
