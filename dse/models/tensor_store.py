"""Tensors that wait until they are needed again: on their device, in host memory or on disk, by budget.

They are the hidden states of calibration windows between two layers, and weights that are not in use.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dse.files import disk_errors

__all__ = ["StoreBudget", "TensorStore"]


@dataclass(frozen=True)
class StoreBudget:
    """How many bytes stay in memory; the rest goes to disk.

    Attributes:
        device_bytes: On the device of the tensors.
        host_bytes: In the memory of the host, for tensors of another device.
    """

    device_bytes: int
    host_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> StoreBudget:
        """A quarter of the device's free memory on a GPU; on a CPU, 256 MiB."""
        if device.type != "cuda":
            return cls(2**28, 0)
        free, _ = torch.cuda.mem_get_info(device)
        return cls(free // 4, 2**33)


class TensorStore:
    """Tensors by key. Each is kept in the first place that has room: its device, host memory, a file.

    The file has no name, so it disappears with the process, however that ends.
    """

    def __init__(self, budget: StoreBudget, folder: Path) -> None:
        self._budget = budget
        self._folder = folder
        self._held: dict[Hashable, Tensor] = {}
        self._stored: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._free: dict[int, list[int]] = {}
        self._device_bytes = self._host_bytes = self._file_bytes = 0
        self._file: Any = None
        self._lock = threading.Lock()

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Bytes on the device, in host memory, and the size of the file."""
        return {"device": self._device_bytes, "host": self._host_bytes, "disk": self._file_bytes}

    def put(self, key: Hashable, states: Tensor) -> None:
        """Keep `states`, in place of those that were kept under this key."""
        self.drop(key)
        states = states.detach()
        size = _size(states)
        with self._lock:
            if self._device_bytes + size <= self._budget.device_bytes:
                self._device_bytes += size
                self._held[key] = states
            elif states.device.type != "cpu" and self._host_bytes + size <= self._budget.host_bytes:
                self._host_bytes += size
                pinned = states.device.type == "cuda"  # copies from pinned memory need no intermediate buffer
                self._held[key] = torch.empty(states.shape, dtype=states.dtype, pin_memory=pinned).copy_(states)
            else:
                self._stored[key] = (self._write(states, size), states.shape, states.dtype)

    def get(self, key: Hashable, device: torch.device) -> Tensor:
        """A copy of the states on `device`, which the caller may change."""
        with self._lock:
            held = self._held.get(key)
            place = self._stored.get(key)
        if held is not None:
            return held.to(device, copy=True)
        if place is None:
            raise KeyError(key)
        offset, shape, dtype = place
        states = torch.empty(shape, dtype=dtype)
        view = memoryview(_bytes_of(states))
        done = 0
        while done < len(view):
            read = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if read <= 0:
                raise OSError(f"tensors on the disk of {self._folder} must be readable, but the file is short")
            done += read
        return states.to(device)

    def drop(self, key: Hashable) -> None:
        """Release the states of this key; nothing if there are none."""
        with self._lock:
            held = self._held.pop(key, None)
            if held is not None:
                if held.device.type == "cpu" and self._host_bytes:
                    self._host_bytes -= _size(held)
                else:
                    self._device_bytes -= _size(held)
            place = self._stored.pop(key, None)
            if place is not None:
                offset, shape, dtype = place
                self._free.setdefault(shape.numel() * dtype.itemsize, []).append(offset)

    def _write(self, states: Tensor, size: int) -> int:
        """Write to a free place of the file, and return its offset."""
        with disk_errors(self._folder):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the store
                weakref.finalize(self, self._file.close)
            places = self._free.get(size)
            if places:
                offset = places.pop()
            else:
                offset, self._file_bytes = self._file_bytes, self._file_bytes + size
            view, done = memoryview(_bytes_of(states.cpu().contiguous())), 0
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        return offset


def _size(states: Tensor) -> int:
    return states.numel() * states.element_size()


def _bytes_of(states: Tensor) -> Any:
    return states.view(-1).view(torch.uint8).numpy()
