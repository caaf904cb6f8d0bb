"""What both evaluators share: limits, batches, out-of-memory handling, shares of the documents, and progress."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from dse.errors import ConfigError, OutOfMemoryError
from dse.out_of_memory import out_of_memory_errors

if TYPE_CHECKING:
    from dse.models import LoadedModel

__all__ = ["TOKENS_PER_ROW", "BatchSize", "answer_identity", "batches", "check_positive", "last_place", "ticker"]

_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")

TOKENS_PER_ROW = 128
"""`batch_size` counts rows of this length, since batches are filled by tokens."""


class BatchSize:
    """The number of rows of 128 tokens in a batch; "auto" halves it whenever the device runs out of memory.

    Args:
        batch_size: Rows, at least 1, or "auto", which starts with 64 on a GPU and 16 elsewhere.
        device_type: Such as "cuda" or "cpu".

    Attributes:
        rows: The present number of rows.

    Raises:
        ConfigError: `batch_size` is below 1 or neither a number nor "auto".
    """

    def __init__(self, batch_size: int | str, device_type: str) -> None:
        self._is_auto = batch_size == "auto"
        rows = batch_size if not self._is_auto else 64 if device_type == "cuda" else 16
        check_positive(batch_size=rows)
        self.rows = int(rows)

    def run(self, work: Callable[[int], _ResultT]) -> _ResultT:
        """Call `work(rows)`; after an out-of-memory error, "auto" calls it again with half the rows.

        Raises:
            OutOfMemoryError: The device has no room for a batch.
        """
        while True:
            try:
                batch = f"an evaluation batch of `batch_size` {self.rows}"
                with out_of_memory_errors(batch, "lower `batch_size` or `max_length`"):
                    return work(self.rows)
            except OutOfMemoryError:
                if not self._is_auto or self.rows == 1:
                    raise
                self.rows //= 2


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
