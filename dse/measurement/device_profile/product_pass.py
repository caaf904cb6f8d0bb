"""One timed pass: products with different weights, back to back.

On a GPU the products of a pass are captured once as a CUDA graph and replayed. Launched from Python one by one, a small
product takes as long as its launch, so factors would look slower than the dense matrix that they replace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dse.measurement.clock import stopwatch_for

__all__ = ["GraphPass", "LaunchedPass", "ProductPass", "pass_kind"]

Multiply = Callable[[Tensor, Tensor], Tensor]

PASS_S = 0.03
"""Work in one pass: long compared with the clock and the scheduler, short enough for hundreds of shapes."""


class ProductPass(ABC):
    """Times products of one shape, each with another weight.

    Args:
        multiply: Multiplies activations with a weight.
        x: Activations, (rows, in_features).
        weights: Different weights of the shape, in the order in which memory is read; at least one.
        cold_bytes: Bytes that must be read before a weight is read again, so that it comes from memory as in the model.
    """

    how: ClassVar[str]
    """How products are launched, for the conditions of a timing."""
    min_products: ClassVar[int]
    max_products: ClassVar[int]

    def __init__(self, multiply: Multiply, x: Tensor, weights: Sequence[Tensor], cold_bytes: int) -> None:
        self.multiply, self.x, self.weights = multiply, x, weights
        self.cold_bytes = cold_bytes
        self.stopwatch = stopwatch_for([x.device])
        self.count = 1

    def fix_count(self) -> None:
        """Choose the number of products of a pass, so that it takes about `PASS_S` and repeats no weight."""
        self.seconds()
        self.count = min(2, len(self.weights))
        estimate_s = max(self.seconds(), 1e-7)
        wanted = max(self.min_products, round(PASS_S / estimate_s))
        self.count = max(1, min(len(self.weights), self.max_products, wanted))

    def seconds(self) -> float:
        """Run `count` products; returns the seconds of one."""
        self.prepare()
        return self.stopwatch.time(self.run)[1] / self.count

    def prepare(self) -> None:  # noqa: B027 - launched products need nothing
        """Work outside the clock, before a pass."""

    @abstractmethod
    def run(self) -> None:
        """Run the products of one pass."""


class LaunchedPass(ProductPass):
    """Products launched one by one, for CPUs; passes go through the weights in a circle."""

    how = "launched"
    min_products = 2
    max_products = 2**20

    def __init__(self, multiply: Multiply, x: Tensor, weights: Sequence[Tensor], cold_bytes: int) -> None:
        super().__init__(multiply, x, weights, cold_bytes)
        self._begin = 0
        self._chosen: list[Tensor] = []

    def prepare(self) -> None:
        """See `ProductPass.prepare`: choose the next weights of the circle."""
        self._chosen = [self.weights[(self._begin + index) % len(self.weights)] for index in range(self.count)]
        self._begin = (self._begin + self.count) % len(self.weights)

    def run(self) -> None:
        """See `ProductPass.run`."""
        for weight in self._chosen:
            self.multiply(self.x, weight)  # dropped: fresh memory for each result would cost as much as a small product


class GraphPass(ProductPass):
    """Products captured once as a CUDA graph and replayed.

    A replay reads the same weights again, so as many other bytes are written before it as one pass of the model reads,
    and the weights leave the caches.
    """

    how = "cuda_graph"
    min_products = 16  # the start of a replay takes as long as a small product
    max_products = 1024

    def __init__(self, multiply: Multiply, x: Tensor, weights: Sequence[Tensor], cold_bytes: int) -> None:
        super().__init__(multiply, x, weights, cold_bytes)
        self._graph: Any = None
        self._captured = 0
        self._other_bytes = torch.empty(max(1, cold_bytes), dtype=torch.uint8, device=x.device)

    def prepare(self) -> None:
        """See `ProductPass.prepare`: capture the products of a new count, and let the weights leave the caches."""
        if self._captured != self.count:
            self._graph = self._capture()
            self._captured = self.count
        self._other_bytes.zero_()

    def run(self) -> None:
        """See `ProductPass.run`."""
        self._graph.replay()

    def _capture(self) -> Any:
        with torch.cuda.device(self.x.device):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.multiply(self.x, self.weights[0])  # libraries choose algorithms in their first call
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for weight in self.weights[: self.count]:
                    self.multiply(self.x, weight)
        return graph


def pass_kind(device: torch.device) -> type[ProductPass]:
    """How products are timed on a device."""
    return GraphPass if device.type == "cuda" else LaunchedPass
