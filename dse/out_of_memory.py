"""Recognise out-of-memory errors, which torch raises in several forms, and report them as `OutOfMemoryError`."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from dse.errors import OutOfMemoryError

__all__ = ["bytes_asked", "is_out_of_memory", "out_of_memory_by_phase", "out_of_memory_errors", "release_cached_memory"]

_Progress = Callable[[str, int, int], None]
_PLAN = "`dse plan` forecasts the memory of every phase"
_SET_UP_PHASES: Mapping[str, tuple[str, str]] = {
    "load": ("loading the model", "use `model.dtype: bfloat16` or a device with more memory"),
    "calibrate": ("the Gram matrices of the factor bank", "use `model.dtype: bfloat16`, or lower `calibration.window`"),
    "gradients": (
        "the gradients of the Fisher methods",
        "name `whitened_svd` in `space.methods`, or lower `calibration.window`",
    ),
    "decompose": (
        "the decompositions of the factor bank",
        "leave the widest tensors out of `space.roles`, or use `model.device: cpu`",
    ),
    "kl_divergence": ("the hidden states of the KL divergence", "lower `evaluation.divergence_tokens`"),
    "sensitivity": (
        "the sensitivity profile",
        "lower `search.profile_tokens`, or set `search: {warm_starts: false, refit: false}`",
    ),
}
"""Phase of set-up to what it does and what lowers its memory."""

# Out-of-memory errors that torch raises as a plain RuntimeError, which only the message identifies: the CPU's
# allocator, a mapped file, the CUDA driver, the workspace of a CUDA library, and Apple's MPS.
_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# torch: "Tried to allocate 2.00 GiB"; numpy: "Unable to allocate 4.00 GiB for an array".
_ASKED = re.compile(r"(?:tried|unable) to allocate (?:more than )?([0-9.]+) *(bytes|KiB|MiB|GiB|TiB)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or on the host."""
    import torch

    is_by_message = isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    return is_by_message or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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


@contextlib.contextmanager
def out_of_memory_by_phase(progress: _Progress, first: str = "load") -> Iterator[_Progress]:
    """Raise `OutOfMemoryError` with the phase that was in progress if the set-up in the block runs out of memory.

    Args:
        progress: The progress callback.
        first: The phase before the first call.

    Yields:
        A progress callback for the block; it remembers the phase.

    Raises:
        OutOfMemoryError: An allocation failed. Finished tensors and measurements are stored by then, so the same
            command continues after them.
    """
    phase = first

    def remember(name: str, done: int, total: int) -> None:
        nonlocal phase
        phase = name
        progress(name, done, total)

    try:
        yield remember
    except (RuntimeError, MemoryError, OutOfMemoryError) as error:
        asked = error.bytes_asked if isinstance(error, OutOfMemoryError) else bytes_asked(str(error))
        if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
            raise
        doing, remedy = _SET_UP_PHASES.get(phase, (f"phase '{phase}'", "use a device with more memory"))
        amount = "of unknown size" if asked is None else f"of {asked} bytes"
        raise OutOfMemoryError(
            f"the device must have room for {doing}, but an allocation {amount} failed; {remedy}, and run the same"
            f" command again, which continues with what is done; {_PLAN}",
            asked,
        ) from error


def release_cached_memory() -> None:
    """Return the memory of unreachable tensors, which the allocator of an accelerator keeps for itself."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()
