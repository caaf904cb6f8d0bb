"""The several ways in which torch runs out of memory, under one name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dse.errors import OutOfMemoryError
from dse.out_of_memory import is_out_of_memory

__all__ = ["out_of_memory_named"]


@contextmanager
def out_of_memory_named(rows: int) -> Iterator[None]:
    """Raise `OutOfMemoryError` for the several ways in which torch runs out of memory.

    Raises:
        OutOfMemoryError: The device has no room for a batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's is a plain one
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"the device must have room for a batch of the evaluation, but `batch_size` {rows} does not fit; "
            f"lower `batch_size` or `max_length`"
        ) from error
