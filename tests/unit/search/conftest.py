from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _caches(own_cache: Path) -> None:
    """Use the caches of the test session."""
