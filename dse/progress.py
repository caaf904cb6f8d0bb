"""How long work reports on itself: one callable, so that numerics know nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ProgressCallback", "ignore_progress"]

ProgressCallback = Callable[[str, int, int], None]
"""Called as `progress(phase, done, total)`."""


def ignore_progress(phase: str, done: int, total: int) -> None:
    """Report to nobody."""
