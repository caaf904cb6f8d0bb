"""Times of matrix products on this device, measured with cold weights and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.files import cache_dir, write_json
from dse.measurement.device_profile.product_pass import LaunchedPass, pass_kind
from dse.measurement.environment import device_description

__all__ = ["REFERENCE", "ProductShape", "ProductTimings", "TimingConditions", "timings_for"]

REFERENCE = (1024, 1024)
"""(out_features, in_features) of the product that every other one is timed against."""

_MIN_RATIOS = 7
_MAX_PASSES = 25
_SETTLED_SPREAD = 1.1
"""Ratios have settled once their upper quartile is at most this factor above the lower one."""

_MIN_PASSES = 5
_AGREEMENT = 1.05
"""The reference has settled once its two fastest passes differ by at most this factor."""

_MAX_FOOTPRINT_BYTES = 2**30
"""No last-level cache holds a gigabyte, so a larger footprint gives the same timings."""

_CACHE_BYTES = 2**28
"""Writing this much evicts everything from the caches of a GPU (50 MB on an H100, 126 MB on a B200)."""


@dataclass(frozen=True)
class ProductShape:
    """A product (rows, in_features) x (in_features, out_features).

    Attributes:
        rows: Tokens multiplied at once: the batch size in decode, batch size x prompt tokens in prefill.
        out_features: Columns of the result.
        in_features: Length of the inner sums.
        is_transposed: Whether the weight is stored as (in_features, out_features), as in GPT-2's `Conv1D`, instead of
            (out_features, in_features), as in `nn.Linear`.
        reordered: Features of its inputs or outputs that are brought into another order, as in pivoted factors; 0 if
            none are.
    """

    rows: int
    out_features: int
    in_features: int
    is_transposed: bool = False
    reordered: int = 0

    @property
    def weight_entries(self) -> int:
        """Number of entries of the weight."""
        return self.out_features * self.in_features

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.weight_entries

    @property
    def key(self) -> str:
        """Key in the timings file."""
        more = " transposed" if self.is_transposed else ""
        more += f" reordered {self.reordered}" if self.reordered else ""
        return f"{self.rows} x {self.in_features} x {self.out_features}{more}"


@dataclass(frozen=True)
class TimingConditions:
    """Everything but the shape that a timing depends on; runs that agree in all of it share their timings.

    Attributes:
        device: Kind and name of the device.
        dtype: Of weights and activations.
        threads: Number of torch's host threads.
        torch_version: Version with the build.
        footprint_bytes: Bytes of weights that one pass of the model reads. A weight is used again only after this many
            other bytes, as in the model, so it is read from the same level of the memory hierarchy.
        launch: How products are launched; see `ProductPass`.
    """

    device: str
    dtype: str
    threads: int
    torch_version: str
    footprint_bytes: int
    launch: str = LaunchedPass.how

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype, footprint_bytes: int) -> TimingConditions:
        """The conditions of this process; the footprint is rounded to a power of two of at most 1 GiB."""
        rounded_bytes = 2 ** round(math.log2(max(footprint_bytes, 2**20)))
        return cls(
            device_description(device),
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            str(torch.__version__),
            min(_MAX_FOOTPRINT_BYTES, rounded_bytes),
            pass_kind(device).how,
        )


class ProductTimings:
    """Timings under one set of conditions: read from a file, measured when missing, and written at once.

    Args:
        device: Where products run.
        dtype: Of weights and activations.
        footprint_bytes: See `TimingConditions`.
        folder: Folder of the files; the user's cache by default.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, footprint_bytes: int, folder: Path | None = None
    ) -> None:
        self.conditions = TimingConditions.here(device, dtype, footprint_bytes)
        self.device = device
        self._dtype = dtype
        digest = hashlib.sha256(json.dumps(asdict(self.conditions), sort_keys=True).encode()).hexdigest()[:16]
        # Earlier versions kept timings per memory layout in the folder device_profiles; those files are ignored.
        self.path = (folder or cache_dir() / "product_timings") / f"{digest}.json"
        self._seconds: dict[str, float] = self._read()
        self._pool: Tensor | None = None

    def has_timing(self, shape: ProductShape) -> bool:
        """Whether this product has already been timed."""
        return shape.key in self._seconds

    def seconds(self, shape: ProductShape) -> float:
        """Seconds of one product, which is measured now if it has no timing yet.

        Raises:
            StorageFullError: The timing cannot be written.
        """
        if shape.key not in self._seconds:
            self._seconds |= self._measure(shape)
            self._write()
        return self._seconds[shape.key]

    def _read(self) -> dict[str, float]:
        try:
            content: Mapping[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in content["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # missing or not a timings file: measure again

    def _write(self) -> None:
        merged = {**self._read(), **self._seconds}  # another process may have added timings
        write_json(self.path, {"conditions": asdict(self.conditions), "seconds": merged})

    @torch.inference_mode()
    def _measure(self, shape: ProductShape) -> dict[str, float]:
        """Seconds by key, measured as a ratio to the reference product with the same number of rows.

        A machine shared with other work changes speed from minute to minute by more than neighbouring ranks differ.
        The ratio to a reference that is timed alternately does not; it is scaled by the reference's first timing.
        """
        reference = ProductShape(shape.rows, *REFERENCE)
        found = {}
        if reference.key not in self._seconds:
            found[reference.key] = _fastest(self._timed_pass(reference))
            if shape == reference:
                return found
        reference_s = {**self._seconds, **found}[reference.key]
        ratio = _alternating_ratio(self._timed_pass(shape), self._timed_pass(reference))
        return found | {shape.key: ratio * reference_s}

    def _timed_pass(self, shape: ProductShape) -> Callable[[], float]:
        """A function that runs products with different weights and returns the seconds of one product."""
        weights = self._weights(shape)
        x = torch.randn(shape.rows, shape.in_features, device=self.device).to(self._dtype)
        multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul if shape.is_transposed else functional.linear
        if shape.reordered:
            multiply = self._with_reordering(multiply, shape)
        cold_bytes = min(self.conditions.footprint_bytes, _CACHE_BYTES)
        timed = pass_kind(self.device)(multiply, x, weights, cold_bytes)
        timed.fix_count()
        return timed.seconds

    def _with_reordering(
        self, multiply: Callable[[Tensor, Tensor], Tensor], shape: ProductShape
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The product, after the features of other activations have been reordered."""
        features = torch.randn(shape.rows, shape.reordered, device=self.device).to(self._dtype)
        order = torch.randperm(shape.reordered, device=self.device).int()

        def run(x: Tensor, weight: Tensor) -> Tensor:
            features.index_select(-1, order)
            return multiply(x, weight)

        return run

    def _weights(self, shape: ProductShape) -> list[Tensor]:
        """Different weights of this shape that together fill the footprint: views of one pool."""
        entries = max(self.conditions.footprint_bytes // self._dtype.itemsize, shape.weight_entries)
        if self._pool is None or self._pool.numel() < entries:
            self._pool = None
            self._pool = torch.empty(entries, dtype=self._dtype, device=self.device).uniform_(-1, 1)
        sizes = (shape.out_features, shape.in_features)
        stored = sizes[::-1] if shape.is_transposed else sizes
        slices = torch.split(self._pool, shape.weight_entries)[: entries // shape.weight_entries]
        return [part.view(stored) for part in slices]


def timings_for(model: nn.Module) -> ProductTimings:
    """Timings of the model's device and dtype, with its own weights as the footprint."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    footprint_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return ProductTimings(first.device, first.dtype, footprint_bytes)


def _alternating_ratio(measure: Callable[[], float], reference: Callable[[], float]) -> float:
    """Median ratio of a measurement to the reference, which is measured right before and right after it.

    Passes are added until the ratios have settled, because other work on the machine disturbs some of them.
    """
    ratios: list[float] = []
    before = reference()
    while len(ratios) < _MIN_RATIOS or (len(ratios) < _MAX_PASSES and not _has_settled(ratios)):
        seconds, after = measure(), reference()
        ratios.append(seconds / ((before + after) / 2))
        before = after
    return statistics.median(ratios)


def _has_settled(ratios: Sequence[float]) -> bool:
    low, _, high = statistics.quantiles(ratios, n=4)
    return high <= _SETTLED_SPREAD * low


def _fastest(measure: Callable[[], float]) -> float:
    """Fastest of several measurements; more are taken while the two fastest differ."""
    found: list[float] = []
    while len(found) < _MIN_PASSES or (len(found) < _MAX_PASSES and found[1] > _AGREEMENT * found[0]):
        found = sorted([*found, measure()])
    return found[0]
