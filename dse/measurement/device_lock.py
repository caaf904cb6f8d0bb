"""One measurement at a time on a device, across all studies of this user on this machine."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dse.files import cache_dir, disk_errors

__all__ = ["device_lock", "lock_file"]

_LOG = logging.getLogger(__name__)


def lock_file(device: torch.device) -> Path:
    """The lock's file in the cache folder. A GPU goes by its UUID where torch knows it: processes number them anew."""
    name = str(device)
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        name = f"cuda-{getattr(torch.cuda.get_device_properties(index), 'uuid', index)}"
    elif device.type == "cpu":
        name = "cpu"  # torch's "cpu:0" is the same processor
    return cache_dir() / "locks" / (re.sub(r"[^A-Za-z0-9.-]", "-", name) + ".lock")


@contextlib.contextmanager
def device_lock(device: torch.device) -> Iterator[None]:
    """Hold `device` for a measurement; waits as long as another process or thread holds it, and logs that once.

    The same thread may enter again. The kernel frees the lock when a process dies.

    Raises:
        StorageFullError: The cache folder cannot be written.
    """
    path = lock_file(device)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # One instance per path within a process makes the lock re-entrant.
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _LOG.info("waiting for %s: another measurement holds %s", device, path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
