"""Turn every kind of "no room" that torch raises into one error that names the bytes asked for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from dse.errors import OutOfMemoryError
from dse.out_of_memory import is_out_of_memory

__all__ = ["bytes_asked", "out_of_memory_errors"]

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ASKED = re.compile(r"tried to allocate (?:more than )?([0-9.]+) *(bytes|KiB|MiB|GiB|TiB)", re.IGNORECASE)


def bytes_asked(message: str) -> int | None:
    """Bytes that an allocator's message says were asked for; None where it does not say."""
    match = _ASKED.search(message)
    if match is None:
        return None
    units = {name.lower(): size for name, size in _UNITS.items()}
    return round(float(match[1]) * units[match[2].lower()])


@contextlib.contextmanager
def out_of_memory_errors(doing: str) -> Iterator[None]:
    """Raise `OutOfMemoryError` when the block runs out of memory, on a GPU or on the host.

    Args:
        doing: What the block does, for the message: "measuring latency".

    Raises:
        OutOfMemoryError: An allocation failed; the message holds the bytes asked, where the allocator said them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        asked = bytes_asked(str(error))
        amount = "an amount that the allocator does not say" if asked is None else f"{asked} bytes"
        raise OutOfMemoryError(
            f"the device must have room for {doing}, but an allocation of {amount} failed; "
            f"lower the batch size or the prompt length",
            asked,
        ) from error
