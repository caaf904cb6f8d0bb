"""What both evaluators share: limits, batches, out-of-memory handling, shares of the documents, and progress."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from dse.errors import ConfigError, OutOfMemoryError
from dse.out_of_memory import out_of_memory_errors, release_cached_memory

if TYPE_CHECKING:
    from dse.models import LoadedModel

__all__ = [
    "TOKENS_PER_ROW",
    "BatchSize",
    "answer_identity",
    "batch_size_of",
    "batches",
    "check_positive",
    "last_place",
    "ticker",
]

_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")

TOKENS_PER_ROW = 128
"""`batch_size` counts rows of this length, since batches are filled by tokens."""

_LEAST_TOKENS = 16
"""Batches of so few tokens hold one sequence, so that halving again changes nothing."""

_log = logging.getLogger("dse")


class BatchSize:
    """The number of tokens in an evaluation batch, halved whenever the device runs out of memory.

    The reduced size stays for all later batches. One object serves all evaluators of a study.

    Args:
        batch_size: Rows of 128 tokens, at least 1, or "auto": 64 on a GPU, 16 elsewhere.
        device_type: Such as "cuda" or "cpu".

    Attributes:
        tokens: The present maximum number of tokens in a batch; a longer sequence forms a batch of its own.
        generation_tokens: The same for batches that generate, whose key-value caches are what takes memory; None until
            one of them does not fit.

    Raises:
        ConfigError: `batch_size` is below 1 or neither a number nor "auto".
    """

    def __init__(self, batch_size: int | str, device_type: str) -> None:
        rows = batch_size if batch_size != "auto" else 64 if device_type == "cuda" else 16
        check_positive(batch_size=rows)
        self.tokens = int(rows) * TOKENS_PER_ROW
        self.generation_tokens: int | None = None

    def run(self, work: Callable[[], _ResultT]) -> _ResultT:
        """Call `work()`, which reads `tokens`; after an out-of-memory error, halve `tokens` and call it again.

        `work` keeps what it has finished, so that nothing is computed twice.

        Raises:
            OutOfMemoryError: The device has no room for the smallest batch.
        """
        while True:
            try:
                what = f"an evaluation batch of {self.tokens} tokens"
                with out_of_memory_errors(what, "lower `evaluation.max_length`, or use a device with more memory"):
                    return work()
            except OutOfMemoryError as error:
                if self.tokens <= _LEAST_TOKENS:
                    raise
                reason = str(error)
            # The exception is gone here, and with it the failed batch, which its traceback refers to.
            self.tokens //= 2
            release_cached_memory()
            _log.warning("%s; batches have at most %d tokens from now on", reason.partition(";")[0], self.tokens)


def batch_size_of(setting: int | str | BatchSize, device_type: str) -> BatchSize:
    """The batch size of a setting, or the given one, which another evaluator of the same study may have reduced."""
    return setting if isinstance(setting, BatchSize) else BatchSize(setting, device_type)


def batches(items: Iterable[_ItemT], length: Callable[[_ItemT], int], most_tokens: int) -> Iterator[list[_ItemT]]:
    """Items, longest first, in batches of at most `most_tokens` tokens, including padding to the longest item.

    A longer item forms a batch of its own.
    """
    batch: list[_ItemT] = []
    for item in items:
        if batch and (len(batch) + 1) * length(batch[0]) > most_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function that takes the number of items just finished and reports `progress(done, total)`."""
    done = 0

    def tick(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None and finished:
            progress(done, total)

    if progress is not None and not total:
        progress(1, 1)  # everything was known: report completion
    return tick


def answer_identity(loaded: LoadedModel, point_id: str, factors: str, *packages: str, **details: str) -> dict[str, str]:
    """Identity of a state of the model, with the `details` of the evaluator and the versions of all `packages`."""
    return {
        "model": loaded.fingerprint,
        "point": point_id,
        "factors": factors,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        **details,
        **{package: importlib.metadata.version(package) for package in ("torch", "transformers", *packages)},
    }


def check_positive(**values: int | str | None) -> None:
    """Check that each named value is an integer of at least 1, or None.

    Raises:
        ConfigError: A value is not.
    """
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name} >= 1` must hold for an evaluation, but got {name}={value!r}")


def last_place(places: Sequence[int], share: float) -> int:
    """The last place in the order of drawing that belongs to a share of the documents, which has at least one.

    A smaller share is a subset of every larger one.

    Args:
        places: Place of each document in the order of drawing.
        share: Above 0 and at most 1.

    Raises:
        ConfigError: The share is outside its interval.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"`0 < share <= 1` must hold for a share of the documents, but got {share!r}")
    count = min(len(places), max(1, math.ceil(share * len(places) - 1e-9)))
    return sorted(places)[count - 1]
