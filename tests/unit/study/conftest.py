from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _caches(own_cache: Path) -> None:
    """Every study of these tests keeps to the session's own caches."""
