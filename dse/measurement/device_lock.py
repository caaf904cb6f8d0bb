"""Exclusive use of a device while measuring, across all processes and studies of this user."""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

from dse.files import cache_dir, disk_errors
from dse.measurement.clock import synchronize
from dse.progress import ProgressCallback

try:
    import fcntl
except ImportError:  # Windows: measurements exclude each other, but not evaluations of other studies
    fcntl = None  # type: ignore[assignment]

__all__ = ["device_in_use", "device_lock", "lock_file", "passing_measurements"]

_LOG = logging.getLogger(__name__)
_Kind = TypeVar("_Kind")

_PATIENCE_S = 120.0
"""A warning follows after this wait: measurements take seconds, evaluations a minute or two."""
_POLL_S = 0.2


def lock_file(device: torch.device) -> Path:
    """The lock file in the cache folder.

    A GPU is named by its UUID if torch knows it: indices differ by process. Other devices are named with the host,
    since the machines of a cluster often share the home folder.
    """
    kind = "cpu" if device.type == "cpu" else str(device)  # "cpu:0" is the same device
    name = f"{kind}-{platform.node()}"
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        name = f"cuda-{index}-{platform.node()}" if uuid is None else f"cuda-{uuid}"
    return cache_dir() / "locks" / (re.sub(r"[^A-Za-z0-9.-]", "-", name) + ".lock")


@contextlib.contextmanager
def device_lock(*devices: torch.device) -> Iterator[None]:
    """Hold `devices` exclusively for a measurement; waits while another process of dse uses one, and logs that once.

    After two minutes a warning follows, because a suspended process keeps its locks for as long as it exists.

    Two locks make the order fair. A measurement holds the first one throughout. Other users of the device
    (`device_in_use`) pass through the first and share the second, so a measurement waits for current users, and new
    ones wait for the measurement.

    The lock is re-entrant within a thread. A thread that already uses a device (`device_in_use`) gives that up for the
    duration of the measurement. The kernel releases both locks when a process dies.

    Raises:
        StorageFullError: The cache folder is not writable.
    """
    with contextlib.ExitStack() as stack:
        for device in _in_order(devices):
            stack.enter_context(_not_in_use(device))
            lock = stack.enter_context(_first_lock(device))
            if lock.lock_counter == 1:  # the outermost entry of this thread
                stack.enter_context(_second_lock(device, is_shared=False))
                stack.enter_context(_noted(_HELD.measured, device, None))
        yield


@contextlib.contextmanager
def device_in_use(*devices: torch.device) -> Iterator[None]:
    """Use `devices` for work other than a measurement, concurrently with other users but never with a measurement.

    Re-entrant within a thread; a thread that holds `device_lock` has the device already.

    Raises:
        StorageFullError: The cache folder is not writable.
    """
    held = _HELD
    with contextlib.ExitStack() as stack:
        for device in _in_order(devices):
            path = lock_file(device)
            if path in held.used or path in held.measured:
                continue  # waiting behind a measurement that waits for this thread would never end
            use = stack.enter_context(contextlib.ExitStack())
            with _first_lock(device):
                use.enter_context(_second_lock(device, is_shared=True))
            stack.enter_context(_noted(held.used, device, use))
        yield


def passing_measurements(progress: ProgressCallback, device: torch.device) -> ProgressCallback:
    """A progress callback that also lets measurements of other processes pass, which wait for `device`.

    Work of many minutes, such as building a factor bank, then delays them by one step only.
    """

    def report(phase: str, done: int, total: int) -> None:
        progress(phase, done, total)
        path = lock_file(device)
        if path not in _HELD.used:
            return
        try:
            FileLock(path, is_singleton=True).acquire(timeout=0).lock.release()
        except Timeout:  # a measurement waits for this thread
            synchronize([device])
            with _not_in_use(device):
                pass

    return report


class _Held(threading.local):
    """What this thread holds, by lock file: the devices it measures on, and those it uses with what ends the use."""

    def __init__(self) -> None:
        self.measured: dict[Path, None] = {}
        self.used: dict[Path, contextlib.ExitStack] = {}


_HELD = _Held()


@contextlib.contextmanager
def _noted(held: dict[Path, _Kind], device: torch.device, what: _Kind) -> Iterator[None]:
    path = lock_file(device)
    held[path] = what
    try:
        yield
    finally:
        del held[path]


@contextlib.contextmanager
def _not_in_use(device: torch.device) -> Iterator[None]:
    """Give up this thread's own use of a device inside the block, and take it up again afterwards."""
    use = _HELD.used.get(lock_file(device))
    if use is None:
        yield
        return
    use.close()
    try:
        yield
    finally:
        with _first_lock(device):
            use.enter_context(_second_lock(device, is_shared=True))


def _in_order(devices: Sequence[torch.device]) -> list[torch.device]:
    """Each device once, in the same order in every process, so that two processes cannot deadlock."""
    return list({lock_file(device): device for device in sorted(devices, key=lambda d: str(lock_file(d)))}.values())


@contextlib.contextmanager
def _first_lock(device: torch.device) -> Iterator[FileLock]:
    path = lock_file(device)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # One instance per path and process makes the lock re-entrant.
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _LOG.info("waiting for %s: another measurement holds %s", device, path)
            try:
                lock.acquire(timeout=_PATIENCE_S)
            except Timeout:
                _warn_about_long_wait(device, path)
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
                    _warn_about_long_wait(device, path)
                    fcntl.flock(stream, kind)
        yield


def _locked_in_time(descriptor: int, kind: int) -> bool:
    """Whether the lock was acquired within `_PATIENCE_S`; `flock` itself has no timeout."""
    until_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until_s:
        time.sleep(_POLL_S)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
    return False


def _warn_about_long_wait(device: torch.device, path: Path) -> None:
    _LOG.warning(
        "still waiting for %s after %.0f s, because another process of dse uses it; if none should, one may be"
        " suspended: `fuser %s` names it",
        device,
        _PATIENCE_S,
        path,
    )
