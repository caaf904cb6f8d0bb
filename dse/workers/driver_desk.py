"""An actor beside the driver: what each worker is doing, and the files of the factor bank for other machines."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dse.errors import StudyError
from dse.files import cache_dir, disk_errors
from dse.workers.ray_cluster import call_actor

__all__ = ["DriverDesk", "bank_files", "fetch_missing", "hand_in"]

_PART_BYTES = 32 * 2**20

Inventory = dict[str, tuple[int, str]]
"""File, relative to the cache folder, to its size and SHA-256."""


class DriverDesk:
    """The actor. It serves the driver's cache folder in parts, which travel through Ray's object store.

    Args:
        root: The driver's cache folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._phases: dict[int, tuple[str, int, int]] = {}
        self._folders: tuple[str, ...] = ()
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}

    def ping(self) -> None:
        """Answer."""

    def note(self, worker: int, phase: str, done: int, total: int) -> None:
        """Note the phase of a worker."""
        self._phases[worker] = (phase, done, total)

    def phases(self) -> dict[int, tuple[str, int, int]]:
        """Worker to its phase, steps done and steps in all."""
        return dict(self._phases)

    def offer(self, folders: tuple[str, ...]) -> None:
        """Let other machines fetch the files of these folders."""
        self._folders = folders

    def inventory(self) -> Inventory:
        """The files on offer."""
        found = bank_files(self._root / folder for folder in self._folders)
        return {str(path.relative_to(self._root)): (path.stat().st_size, self._digest(path)) for path in found}

    def send(self, name: str, offset: int) -> bytes:
        """A part of a file."""
        with (self._root / name).open("rb") as stream:
            stream.seek(offset)
            return stream.read(_PART_BYTES)

    def lacks(self, inventory: Inventory) -> list[str]:
        """Files of a worker's inventory that are absent or different here."""
        return _missing(self._root, inventory)

    def receive(self, name: str, offset: int, content: bytes) -> None:
        """Store a part of a file."""
        _write_part(self._root / name, offset, content)

    def accept(self, name: str, digest: str) -> None:
        """Move a file that has arrived to its place."""
        _accept(self._root / name, digest)

    def _digest(self, path: Path) -> str:
        status = path.stat()
        key = (status.st_size, status.st_mtime_ns)
        if self._digests.get(path, (None, ""))[0] != key:
            self._digests[path] = (key, _digest(path))
        return self._digests[path][1]


def bank_files(folders: Iterable[Path]) -> list[Path]:
    """The files of these folders, manifests last, so that an interrupted transfer leaves no false manifest."""
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    files = [path for path in found if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: (path.suffix == ".json", path))


def fetch_missing(desk: Any) -> None:
    """Fetch what this machine lacks of the files that the driver offers.

    Raises:
        StudyError: A checksum differs.
        StorageFullError: The disk is full.
    """
    inventory: Inventory = call_actor(desk, "inventory").result()
    for name in _missing(cache_dir(), inventory):
        size, digest = inventory[name]
        path = cache_dir() / name
        for offset in range(0, max(size, 1), _PART_BYTES):
            _write_part(path, offset, call_actor(desk, "send", name, offset).result())
        _accept(path, digest)


def hand_in(desk: Any, files: Iterable[Path]) -> None:
    """Send the files of this machine's factor bank that the driver's cache folder lacks."""
    root = cache_dir()
    inventory = {str(path.relative_to(root)): (path.stat().st_size, _digest(path)) for path in files}
    for name in call_actor(desk, "lacks", inventory).result():
        with (root / name).open("rb") as stream:
            offset = 0
            while (content := stream.read(_PART_BYTES)) or offset == 0:
                call_actor(desk, "receive", name, offset, content).result()
                offset += max(len(content), 1)
        call_actor(desk, "accept", name, inventory[name][1]).result()


def _missing(root: Path, inventory: Mapping[str, tuple[int, str]]) -> list[str]:
    found = []
    for name, (size, digest) in inventory.items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
            found.append(name)
    return found


def _write_part(path: Path, offset: int, content: bytes) -> None:
    path = _arriving(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if offset else "wb") as stream:
            stream.seek(offset)
            stream.write(content)


def _accept(path: Path, digest: str) -> None:
    arrived = _arriving(path)
    if _digest(arrived) != digest:
        arrived.unlink(missing_ok=True)
        raise StudyError(
            f"{path.name} must arrive unchanged at {socket.gethostname()}, but its checksum differs; run the same"
            " command again"
        )
    arrived.replace(path)


def _arriving(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
