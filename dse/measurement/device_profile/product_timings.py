"""Seconds of matrix products on this device, measured with cold weights and kept for the next time."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dse.files import cache_dir, write_json
from dse.kernel import FEW_ROWS, NO_KERNEL, ChainMatrix, KernelChains, kernel_name
from dse.measurement.clock import stopwatch_for
from dse.measurement.environment import device_description
from dse.runtime.onednn import has_onednn, linear_by_onednn
from dse.runtime.products import Layout

__all__ = ["REFERENCE", "ProductShape", "ProductTimings", "TimingConditions"]

REFERENCE = (1024, 1024)
"""(out_features, in_features) of the product that all others are timed beside."""

_TURNS = 7
_SPREAD = 1.1
"""Ratios are settled once their upper quartile is at most so many times the lower one."""

_PASSES = 5
_MOST_PASSES = 25
_AGREEMENT = 1.05
_PASS_S = 0.03
"""Work in one timed pass: long against the clock and the scheduler, short enough for hundreds of shapes."""

_PRODUCTS_A_CALL = 64
"""With the kernel; a model's layers are one call, so that what a call costs is no part of a product's time."""

_CLEARLY_FASTER = 0.95

_PANELS_GAIN = 0.9
"""Layers by panels need no other layout between their products, attention among them: a tenth of a prompt's time."""


@dataclass(frozen=True)
class ProductShape:
    """A product (rows, in_features) x (in_features, out_features).

    Attributes:
        rows: Tokens at once: the batch size in decode, batch size x prompt tokens in prefill.
        out_features: Columns of the result.
        in_features: Length of the sums.
    """

    rows: int
    out_features: int
    in_features: int

    @property
    def weight_entries(self) -> int:
        """Numbers in the weight."""
        return self.out_features * self.in_features

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.weight_entries

    def key(self, layout: Layout) -> str:
        """Its name in a file; what lies row by row is multiplied in one way where rows are few."""
        way = layout if layout == "column_major" or self.rows > FEW_ROWS else "row_major"
        return f"{self.rows} x {self.in_features} x {self.out_features} {way}"


@dataclass(frozen=True)
class TimingConditions:
    """What a timing depends on beside the shape; timings are shared by runs that agree in all of it.

    Attributes:
        device: Kind and name of the device.
        dtype: Of weights and activations.
        threads: Of torch on the host.
        torch_version: With the build.
        footprint_bytes: Weights that one pass of the model reads: a product's weight is read again only after so many
            others, as in the model, so that it comes from where the model's would come from.
        kernel: What computes decode steps (`dse.kernel.kernel_name`).
    """

    device: str
    dtype: str
    threads: int
    torch_version: str
    footprint_bytes: int
    kernel: str

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype, footprint_bytes: int) -> TimingConditions:
        """The conditions of this process; the footprint is rounded to a power of two, 1 GiB at most.

        No last-level cache holds a gigabyte, so that more would tell nothing else.
        """
        return cls(
            device_description(device),
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            str(torch.__version__),
            min(2**30, 2 ** round(math.log2(max(footprint_bytes, 2**20)))),
            kernel_name(device, dtype),
        )


class ProductTimings:
    """Timings under one set of conditions: read from a file, measured where they are missing, written at once.

    Args:
        device: Where products run.
        dtype: Of weights and activations.
        footprint_bytes: See `TimingConditions`.
        folder: Of the files; None for the user's cache.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, footprint_bytes: int, folder: Path | None = None
    ) -> None:
        self.conditions = TimingConditions.here(device, dtype, footprint_bytes)
        self._device, self._dtype = device, dtype
        digest = hashlib.sha256(json.dumps(asdict(self.conditions), sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_dir() / "device_profiles") / f"{digest}.json"
        self._seconds: dict[str, float] = self._read()
        self._pool: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where products run."""
        return self._device

    @property
    def has_kernel(self) -> bool:
        """Whether row-major products of few rows that follow from one input are one call of the kernel."""
        return self.conditions.kernel != NO_KERNEL

    def knows(self, shape: ProductShape, layout: Layout) -> bool:
        """Whether a timing is at hand."""
        return shape.key(layout) in self._seconds

    def is_known(self, shape: ProductShape) -> bool:
        """Whether all timings are at hand that `best_seconds` looks at."""
        reference = ProductShape(shape.rows, *REFERENCE)
        if shape.rows > FEW_ROWS and not all(self.knows(reference, layout) for layout in self._row_layouts):
            return False
        return all(self.knows(shape, layout) for layout in self._layouts_of(shape.rows, is_alone=False))

    def seconds(self, shape: ProductShape, layout: Layout) -> float:
        """Seconds of one product; measured now where it is not known.

        Raises:
            StorageFullError: The timing cannot be kept.
        """
        key = shape.key(layout)
        if key not in self._seconds:
            self._seconds |= self._measure(shape, layout)
            self._write()
        return self._seconds[key]

    def best_layout(self, shape: ProductShape) -> Layout:
        """The faster layout; the usual one, row by row, unless the other is clearly faster."""
        return self.best_layout_of({shape: 1})

    def best_layout_of(self, counts: Mapping[ProductShape, int], *, is_alone: bool = False) -> Layout:
        """The layout of a weight that several products share, each taken so often.

        With the kernel weights lie row by row, since it runs whole layers so; what is alone, such as the output head,
        may lie otherwise.
        """
        layouts = self._layouts_of(max(shape.rows for shape in counts), is_alone=is_alone)
        if len(layouts) == 1:
            return layouts[0]
        rows, columns = (self.total_seconds(counts, layout) for layout in layouts)
        return layouts[1] if columns < _CLEARLY_FASTER * rows else layouts[0]

    def _layouts_of(self, rows: int, *, is_alone: bool) -> tuple[Layout, ...]:
        by_row = self.row_layout(rows)
        return (by_row,) if self.has_kernel and not is_alone else (by_row, "column_major")

    @property
    def _row_layouts(self) -> tuple[Layout, ...]:
        """What can be had here of the layouts that lie row by row."""
        onednn: tuple[Layout, ...] = ("row_major_onednn",) if has_onednn(self._device, self._dtype) else ()
        panels: tuple[Layout, ...] = ("row_major_panels",) if self.has_kernel else ()
        return ("row_major", *onednn, *panels)

    def row_layout(self, rows: int) -> Layout:
        """Which of those that lie row by row, by the reference product alone: the better library is the machine's.

        Shape by shape, chance would choose now and then. They differ where rows are many.
        """
        if rows <= FEW_ROWS:
            return "row_major"
        reference = ProductShape(rows, *REFERENCE)
        seconds = {layout: self.seconds(reference, layout) for layout in self._row_layouts}
        best = min(seconds, key=seconds.__getitem__)
        if seconds.get("row_major_panels", math.inf) * _PANELS_GAIN <= seconds[best]:
            return "row_major_panels"
        return best if seconds[best] < _CLEARLY_FASTER * seconds["row_major"] else "row_major"

    def total_seconds(self, counts: Mapping[ProductShape, int], layout: Layout) -> float:
        """Seconds of all these products, each taken so often."""
        return sum(count * self.seconds(shape, layout) for shape, count in counts.items())

    def best_seconds(self, shape: ProductShape) -> float:
        """Seconds in the better layout."""
        return self.seconds(shape, self.best_layout(shape))

    def let_go(self) -> None:
        """Free the memory that timing needs; the next timing takes it again."""
        self._pool = None

    def _read(self) -> dict[str, float]:
        try:
            content: Mapping[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in content["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # none yet, or not ours: measured anew

    def _write(self) -> None:
        merged = {**self._read(), **self._seconds}  # another process may have added some
        write_json(self.path, {"conditions": asdict(self.conditions), "seconds": merged})

    @torch.inference_mode()
    def _measure(self, shape: ProductShape, layout: Layout) -> dict[str, float]:
        """Seconds by key, taken by turns with a product that is the same for all shapes of as many rows.

        A machine shared with other work is faster in one minute than in the next, by more than layouts or ranks
        differ. So what is kept is the ratio to that product, times its own seconds when it was timed first.
        """
        reference = ProductShape(shape.rows, *REFERENCE)
        key, found = reference.key("row_major"), {}
        if key not in self._seconds:
            found[key] = _least(self._pass(reference, "row_major"))
            if shape.key(layout) == key:
                return found
        ratio = _ratio_by_turns(self._pass(shape, layout), self._pass(reference, "row_major"))
        return found | {shape.key(layout): ratio * {**self._seconds, **found}[key]}

    def _pass(self, shape: ProductShape, layout: Layout) -> Callable[[], float]:
        """What times some products by as many different weights, and gives the seconds of one."""
        weights = self._weights(shape)
        given = torch.randn(shape.rows, shape.in_features, device=self._device).to(self._dtype)
        stopwatch = stopwatch_for([self._device])
        begin = 0

        def one_pass(count: int) -> float:
            nonlocal begin
            chosen = [(begin + index) % len(weights) for index in range(count)]
            begin += count
            multiply = self._products(weights, chosen, shape, layout)
            return stopwatch.time(lambda: _multiply(multiply, given))[1] / count

        one_pass(1)
        estimate_s = max(one_pass(2), 1e-7)
        return functools.partial(one_pass, max(2, min(len(weights), round(_PASS_S / estimate_s))))

    def _products(
        self, weights: Sequence[Tensor], chosen: Sequence[int], shape: ProductShape, layout: Layout
    ) -> list[Callable[[Tensor], Tensor]]:
        """The products by some of the weights as the model's fast form takes them: with the kernel many in one call."""
        if layout == "column_major":
            return [_by_columns(weights[index].view(shape.in_features, shape.out_features)) for index in chosen]
        is_by_kernel = shape.rows <= FEW_ROWS or layout == "row_major_panels"
        if not is_by_kernel or not KernelChains.is_for(weights[0]):
            by = linear_by_onednn if layout == "row_major_onednn" else functional.linear
            rows = [weights[index].view(shape.out_features, shape.in_features) for index in chosen]
            return [functools.partial(_by_rows, by, weight) for weight in rows]
        pool, size = self._pool, shape.weight_entries
        assert pool is not None  # noqa: S101 - the weights are parts of it
        places = [ChainMatrix(shape.out_features, shape.in_features, index * size) for index in chosen]
        calls = [places[first : first + _PRODUCTS_A_CALL] for first in range(0, len(places), _PRODUCTS_A_CALL)]
        return [KernelChains.one_by_one(pool, call) for call in calls]

    def _weights(self, shape: ProductShape) -> list[Tensor]:
        """Different weights of this shape, together as large as the footprint: slices of one pool."""
        entries = max(self.conditions.footprint_bytes // self._dtype.itemsize, shape.weight_entries)
        if self._pool is None or self._pool.numel() < entries:
            self._pool = None
            self._pool = torch.empty(entries, dtype=self._dtype, device=self._device).uniform_(-1, 1)
        return list(torch.split(self._pool, shape.weight_entries))[: entries // shape.weight_entries]


def _ratio_by_turns(measure: Callable[[], float], reference: Callable[[], float]) -> float:
    """The median ratio to the reference, which is measured right before and right after.

    Of more turns while ratios are far apart: then other work came and went between them.
    """
    ratios: list[float] = []
    before = reference()
    while len(ratios) < _TURNS or (len(ratios) < _MOST_PASSES and not _is_settled(ratios)):
        seconds, after = measure(), reference()
        ratios.append(seconds / ((before + after) / 2))
        before = after
    return statistics.median(ratios)


def _is_settled(ratios: Sequence[float]) -> bool:
    low, _, high = statistics.quantiles(ratios, n=4)
    return high <= _SPREAD * low


def _least(measure: Callable[[], float]) -> float:
    """The least of some measurements; of more while the two least differ: other work came between."""
    found: list[float] = []
    while len(found) < _PASSES or (len(found) < _MOST_PASSES and found[1] > _AGREEMENT * found[0]):
        found = sorted([*found, measure()])
    return found[0]


def _multiply(products: Sequence[Callable[[Tensor], Tensor]], given: Tensor) -> None:
    for product in products:
        product(given)  # nothing is kept: fresh memory for every result would cost as much as some products


def _by_columns(columns: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda given: given @ columns


def _by_rows(linear: Callable[[Tensor, Tensor], Tensor], rows: Tensor, given: Tensor) -> Tensor:
    return linear(given, rows)
