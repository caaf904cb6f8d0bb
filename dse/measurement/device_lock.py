"""One measurement at a time on a device, and nothing else of ours beside it, across all studies of this user."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dse.files import cache_dir, disk_errors

try:
    import fcntl
except ImportError:  # Windows: measurements exclude each other, but not the evaluations of other studies
    fcntl = None  # type: ignore[assignment]

__all__ = ["device_in_use", "device_lock", "lock_file"]

_LOG = logging.getLogger(__name__)

_PATIENCE_S = 120.0
"""Others' measurements take seconds, evaluations a minute or two; who waits longer should learn what for."""
_POLL_S = 0.2


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
def device_lock(*devices: torch.device) -> Iterator[None]:
    """Hold `devices` alone for a measurement; waits as long as anything else of ours uses one, and logs that once.

    After two minutes a warning says so, too: a process that was suspended holds its locks for as long as it exists.

    Two locks make it fair. A measurement holds the first throughout; mere users of the device (`device_in_use`) only
    pass through it and share the second. So a measurement waits for the users that are in, and none enters meanwhile.

    The same thread may enter again. The kernel frees both locks when a process dies.

    Raises:
        StorageFullError: The cache folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for device in _in_order(devices):
            lock = stack.enter_context(_first_lock(device))
            if lock.lock_counter == 1:  # the outermost entry of this thread: the others stand inside it
                stack.enter_context(_second_lock(device, is_shared=False))
        yield


@contextlib.contextmanager
def device_in_use(*devices: torch.device) -> Iterator[None]:
    """Use `devices` for other work than a measurement, beside other users but never beside a measurement.

    Must not be entered by a thread that measures.

    Raises:
        StorageFullError: The cache folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for device in _in_order(devices):
            with _first_lock(device):
                stack.enter_context(_second_lock(device, is_shared=True))
        yield


def _in_order(devices: Sequence[torch.device]) -> list[torch.device]:
    """Each device once, in one order for every process, so that two that want the same pair cannot wait in a ring."""
    return list({lock_file(device): device for device in sorted(devices, key=lambda d: str(lock_file(d)))}.values())


@contextlib.contextmanager
def _first_lock(device: torch.device) -> Iterator[FileLock]:
    path = lock_file(device)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # One instance per path within a process makes the lock re-entrant.
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _LOG.info("waiting for %s: another measurement holds %s", device, path)
            try:
                lock.acquire(timeout=_PATIENCE_S)
            except Timeout:
                _warn_of_long_wait(device, path)
                lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def _second_lock(device: torch.device, *, is_shared: bool) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    path = lock_file(device).with_suffix(".users")
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            stream = stack.enter_context(path.open("ab"))
            try:
                fcntl.flock(stream, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                _LOG.info("waiting for %s: other trials use it (%s)", device, path)
                if not _locked_in_time(stream.fileno(), kind):
                    _warn_of_long_wait(device, path)
                    fcntl.flock(stream, kind)
        yield


def _locked_in_time(descriptor: int, kind: int) -> bool:
    """Whether the lock was had within `_PATIENCE_S`; `flock` itself knows no limit."""
    until_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until_s:
        time.sleep(_POLL_S)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
    return False


def _warn_of_long_wait(device: torch.device, path: Path) -> None:
    _LOG.warning(
        "still waiting for %s after %.0f s, since another process of dse uses it; if none should, one may be suspended:"
        " `fuser %s` names it",
        device,
        _PATIENCE_S,
        path,
    )
