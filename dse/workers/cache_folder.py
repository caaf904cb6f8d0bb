"""The driver's cache folder, and how a worker recognises that it shares it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dse.config import WorkersConfig
from dse.files import cache_dir, disk_errors

__all__ = ["CacheFolder", "driver_cache_folder"]


@dataclass(frozen=True)
class CacheFolder:
    """The driver's cache folder.

    Attributes:
        path: Where it is on the driver's machine.
        token: Name of an empty file in it, by which a worker recognises the same folder.
        is_named: Whether the study names the folder, which then precedes the worker's own.
    """

    path: Path
    token: str
    is_named: bool


@contextlib.contextmanager
def driver_cache_folder(settings: WorkersConfig) -> Iterator[CacheFolder]:
    """The driver's cache folder, with a file in it by which workers recognise it."""
    root = cache_dir() if settings.cache is None else Path(settings.cache).expanduser()
    token = f".driver-{uuid.uuid4().hex}"
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        (root / token).touch()
    try:
        yield CacheFolder(root.resolve(), token, settings.cache is not None)
    finally:
        with contextlib.suppress(OSError):
            (root / token).unlink()
