"""Memory in huge pages, where Linux gives them: a pass over the weights looks up five hundred times fewer addresses.

With pages of 4 KiB, and on virtual machines above all, translating addresses takes a good part of the time in which a
decode step reads its weights; how large a part depends on where the pages happen to lie. Huge pages are faster, and the
same for all weights, so that a point and the dense model are read alike.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

__all__ = ["HUGE_PAGE_BYTES", "HugePages", "prefer_huge_pages"]

HUGE_PAGE_BYTES = 2**21
"""Of x86 and most ARM systems; where they are larger or missing, nothing is lost but the wish."""

_CHUNK_BYTES = 32 * HUGE_PAGE_BYTES
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python does not name: make huge pages of these now


class HugePages:
    """Gives tensors on the CPU, one after the other in large stretches of memory, each freed with its last tensor."""

    def __init__(self) -> None:
        self._rest: Tensor | None = None

    def empty(self, entries: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor, uninitialised; ordinary memory where huge pages cannot be asked for."""
        if _ADVICE is None:
            return torch.empty(entries, dtype=dtype)
        size = entries * dtype.itemsize
        taken = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._rest is None or len(self._rest) < taken:
            self._rest = _stretch(max(taken, _CHUNK_BYTES))
        found, self._rest = self._rest[:size], self._rest[taken:]
        return found.view(dtype)


def _stretch(size: int) -> Tensor:
    """Bytes that begin with a huge page; what is never touched takes no memory."""
    assert _ADVICE is not None  # noqa: S101 - narrows the type
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES)
    memory.madvise(_ADVICE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # holds the mapping
    begin = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[begin : begin + size]


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a tensor that lies in memory already; nothing happens where the system has none."""
    if _ADVICE is None or tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size = (storage.data_ptr() + storage.nbytes() - begin) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if size > 0:
        libc = ctypes.CDLL(None)
        for advice in (_ADVICE, _COLLAPSE):  # an answer of -1 means that the kernel is older, or has no room
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(advice))
