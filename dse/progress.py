"""The progress callback of long computations. Numerical code calls it and does not depend on a terminal."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ProgressCallback", "ignore_progress"]

ProgressCallback = Callable[[str, int, int], None]
"""Called as `progress(phase, done, total)`."""


def ignore_progress(phase: str, done: int, total: int) -> None:
    """Discard the report."""
