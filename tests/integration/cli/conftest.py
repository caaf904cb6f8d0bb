from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _caches(own_cache: Path, own_process: None) -> None:
    """Every command of these tests keeps to the session's own caches, and leaves this process as it was."""
