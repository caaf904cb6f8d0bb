"""Atomic file writes, and the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from dse.errors import StorageFullError

__all__ = ["cache_dir", "disk_errors", "write_bytes", "write_json", "write_text"]


def cache_dir() -> Path:
    """Folder of cached models, factor banks and evaluations: `$DSE_CACHE`, or else the platform's user cache folder."""
    override = os.environ.get("DSE_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("dse"))


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise `StorageFullError` for full, read-only and forbidden paths inside this block."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"the disk that holds {path} must have free space, but it is full; free some space"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StorageFullError(f"{path} must be writable, but: {error.strerror}; choose another folder") from error
        raise


def write_bytes(path: Path, content: bytes, *, is_durable: bool = True) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one, never a partial one.

    Args:
        path: The file.
        content: Its new content.
        is_durable: Whether it must survive a loss of power. False saves the wait for the disk, for files with a digest
            that can be computed again; a killed process loses nothing either way.

    Raises:
        StorageFullError: The disk is full or the folder cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                if is_durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_text(path: Path, content: str, *, is_durable: bool = True) -> None:
    """Write UTF-8 text atomically; see `write_bytes`."""
    write_bytes(path, content.encode("utf-8"), is_durable=is_durable)


def write_json(path: Path, content: Any, *, is_durable: bool = True) -> None:
    """Write `content` as indented JSON atomically; see `write_bytes`. NaN and infinity raise ValueError."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n", is_durable=is_durable)
