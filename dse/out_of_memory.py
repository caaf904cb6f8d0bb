"""Tell a lack of memory from other errors: torch says it in several ways."""

from __future__ import annotations

__all__ = ["is_out_of_memory"]

# torch's CPU allocator raises a plain RuntimeError, known only by its words.
_CPU_MARKS = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or on the host."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _CPU_MARKS)
