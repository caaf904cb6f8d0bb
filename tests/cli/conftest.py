from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _process(own_cache: Path) -> Iterator[None]:
    """Own caches; and what `main` sets for a process of its own is put back for the tests that follow."""
    handler, logger = signal.getsignal(signal.SIGTERM), logging.getLogger("dse")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield
    signal.signal(signal.SIGTERM, handler)
    logger.handlers[:], logger.propagate = handlers, propagate
