"""Recognise out-of-memory errors, which torch raises in several forms, and report them as `OutOfMemoryError`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from dse.errors import OutOfMemoryError

__all__ = ["bytes_asked", "is_out_of_memory", "out_of_memory_errors"]

# torch's CPU allocator raises a plain RuntimeError that only its message identifies.
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_ASKED = re.compile(r"tried to allocate (?:more than )?([0-9.]+) *(bytes|KiB|MiB|GiB|TiB)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or on the host."""
    import torch

    is_on_cpu = isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)
    return is_on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def bytes_asked(message: str) -> int | None:
    """The size of the failed allocation according to the allocator's message; None if it gives no size."""
    match = _ASKED.search(message)
    return None if match is None else round(float(match[1]) * _UNITS[match[2].lower()])


@contextlib.contextmanager
def out_of_memory_errors(doing: str, remedy: str = "lower the batch size or the prompt length") -> Iterator[None]:
    """Raise `OutOfMemoryError` if the block runs out of memory, on an accelerator or on the host.

    Args:
        doing: What the block does, for the message, such as "measuring latency".
        remedy: What the user can do, for the message.

    Raises:
        OutOfMemoryError: An allocation failed; `bytes_asked` is its size if the allocator reports it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        asked = bytes_asked(str(error))
        amount = "of unknown size" if asked is None else f"of {asked} bytes"
        raise OutOfMemoryError(
            f"the device must have room for {doing}, but an allocation {amount} failed; {remedy}", asked
        ) from error
