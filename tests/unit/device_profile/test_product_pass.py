"""What a timed pass runs: weights are cold, none repeats within a pass, and the seconds are those of one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dse.measurement.clock import Stopwatch
from dse.measurement.device_profile.product_pass import GraphPass, LaunchedPass, ProductPass, pass_kind

LAUNCH_S = 0.001


class ScriptedStopwatch(Stopwatch):
    """Every product takes a millisecond."""

    source = "script"

    def __init__(self, used: list[int]) -> None:
        self._used = used

    def time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        before = len(self._used)
        result = work()
        return result, LAUNCH_S * (len(self._used) - before)


def recorded(kind: type[ProductPass], weights: int, **changes: Any) -> tuple[ProductPass, list[int]]:
    """A pass over `weights` matrices, and the index of each weight that it multiplies, in order."""
    used: list[int] = []

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        used.append(int(weight[0, 0]))
        return x @ weight

    found = kind(multiply, torch.ones(1, 2), [torch.full((2, 2), float(i)) for i in range(weights)], 8)
    for name, value in changes.items():
        setattr(found, name, value)
    found.stopwatch = ScriptedStopwatch(used)
    return found, used


def test_passes_go_through_the_weights_in_a_circle_and_divide_by_their_number() -> None:
    timed, used = recorded(LaunchedPass, weights=5, count=3)
    for _ in range(4):
        assert timed.seconds() == pytest.approx(LAUNCH_S)
    assert used == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_pass_is_as_long_as_the_clock_needs_and_repeats_no_weight() -> None:
    many, used = recorded(LaunchedPass, weights=100)
    many.fix_count()
    assert many.count == 30  # 0.03 s of work at a millisecond each
    used.clear()
    many.seconds()
    assert len(set(used)) == len(used) == 30
    few, _ = recorded(LaunchedPass, weights=4)
    few.fix_count()
    assert few.count == 4
    single, _ = recorded(LaunchedPass, weights=1)
    single.fix_count()
    assert single.count == 1


class EagerGraphPass(GraphPass):
    """A graph that runs where there is no GPU: the capture is a list of the products."""

    def _capture(self) -> Any:
        weights = list(self.weights[: self.count])
        self.captures = [*getattr(self, "captures", []), self.count]
        self.flushed: list[bool] = []
        return type("Graph", (), {"replay": lambda _self: [self.multiply(self.x, weight) for weight in weights]})()

    def run(self) -> None:
        self.flushed.append(not self._other_bytes.any())
        super().run()
        self._other_bytes.fill_(1)  # what the caches would hold now


def test_a_graph_is_captured_once_and_its_weights_leave_the_caches_before_every_replay() -> None:
    timed, used = recorded(EagerGraphPass, weights=100)
    assert isinstance(timed, EagerGraphPass)
    timed.fix_count()
    for _ in range(3):
        assert timed.seconds() == pytest.approx(LAUNCH_S)
    assert timed.captures == [1, 2, 30]
    assert timed.flushed == [True, True, True]
    assert used[-30:] == list(range(30))  # the replay reads different weights
    assert timed._other_bytes.numel() == 8


def test_a_graph_of_small_products_has_enough_of_them() -> None:
    """Large products: at least sixteen, so that the start of the replay does not count."""
    timed, _ = recorded(EagerGraphPass, weights=100)
    timed.stopwatch = type("Slow", (), {"time": lambda _self, work: (work(), 5.0)})()
    timed.fix_count()
    assert timed.count == 16


def test_gpus_replay_and_cpus_launch() -> None:
    assert pass_kind(torch.device("cuda:1")) is GraphPass
    assert pass_kind(torch.device("cpu")) is LaunchedPass
