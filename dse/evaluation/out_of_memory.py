"""The several ways in which torch runs out of memory, under one name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dse.errors import OutOfMemoryError

__all__ = ["out_of_memory_named"]

# The CPU allocator raises a plain RuntimeError, known only by its words.
_OUT_OF_MEMORY_WORDS = ("not enough memory", "can't allocate memory")


@contextmanager
def out_of_memory_named(rows: int) -> Iterator[None]:
    """Raise `OutOfMemoryError` for the several ways in which torch runs out of memory.

    Raises:
        OutOfMemoryError: The device has no room for a batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's is a plain one
        is_full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not is_full and not any(words in str(error) for words in _OUT_OF_MEMORY_WORDS):
            raise
        raise OutOfMemoryError(
            f"the device must have room for a batch of the evaluation, but {rows} rows do not fit; "
            f"lower `batch_size` or `max_length`"
        ) from error
