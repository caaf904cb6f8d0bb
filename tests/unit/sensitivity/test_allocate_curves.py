"""Ranks from curves against every combination written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.cost import cost
from dse.errors import AllocationError
from dse.sensitivity.allocation_curves import allocate_curves
from dse.topology import DecomposableTensor, Topology

SHAPES = ((6, 6), (4, 8), (9, 5))


def topology_of_shapes() -> Topology:
    tensors = tuple(
        DecomposableTensor(f"layers.{i}.up", f"m.{i}", i, "up", rows, columns)
        for i, (rows, columns) in enumerate(SHAPES)
    )
    return Topology("Made", "made", len(SHAPES), tensors, sum(t.parameters for t in tensors) + 20)


def curves_of(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        f"layers.{i}.up": np.append(np.sort(generator.exponential(size=min(shape)))[::-1].cumsum()[::-1], 0.0)
        for i, shape in enumerate(SHAPES)
    }


def every_combination(curves: dict[str, np.ndarray]) -> list[tuple[int, float]]:
    """(Parameters, divergence) of all choices: dense or a rank that saves something, for each tensor."""
    options = []
    for (rows, columns), divergence in zip(SHAPES, curves.values(), strict=True):
        ranks = range(1, (rows * columns - 1) // (rows + columns) + 1)
        options.append([(rows * columns, 0.0), *((r * (rows + columns), float(divergence[r])) for r in ranks)])
    return [(sum(p for p, _ in chosen), sum(d for _, d in chosen)) for chosen in itertools.product(*options)]


@given(seed=st.integers(0, 10_000), reduction=st.floats(0.02, 0.55))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_met_and_divergence_is_within_a_step_of_the_least(seed: int, reduction: float) -> None:
    topology, curves = topology_of_shapes(), curves_of(seed)
    found = allocate_curves(topology, curves, reduction)
    arithmetic = cost(topology, found.point)
    assert found.reduction == pytest.approx(arithmetic.reduction)
    assert found.reduction >= reduction - 1e-12
    budget = topology.parameters_dense * (1 - reduction) - 20
    best = min(divergence for parameters, divergence in every_combination(curves) if parameters <= budget)
    # The gap of the relaxation is at most one tensor's step.
    steps = max(float(np.abs(np.diff(divergence[1:])).max()) for divergence in curves.values())
    dense_steps = max(float(divergence[(len(divergence) - 1) // 2]) for divergence in curves.values())
    assert found.divergence <= best + steps + dense_steps


def test_ranks_go_where_divergence_is() -> None:
    """A tensor whose curve is a hundredth of its twin's gives up all it can first."""
    tensors = tuple(DecomposableTensor(f"layers.{i}.up", f"m.{i}", i, "up", 8, 8) for i in range(2))
    topology = Topology("Made", "made", 2, tensors, 128)
    shape = np.linspace(1, 0, 9)
    found = allocate_curves(topology, {"layers.0.up": 100 * shape, "layers.1.up": shape}, 0.3)
    assert list(found.point.by_name) == ["layers.1.up"]
    assert found.point.by_name["layers.1.up"].rank == 1


def test_ranks_keep_the_multiple_and_the_method() -> None:
    found = allocate_curves(topology_of_shapes(), curves_of(1), 0.25, method="whitened_svd", multiple=2)
    assert {choice.method for _, choice in found.point} == {"whitened_svd"}
    assert all(choice.rank % 2 == 0 for _, choice in found.point)


@pytest.mark.parametrize("reduction", [0.0, -0.1, 0.95])
def test_a_budget_that_cannot_be_met_is_refused_with_the_interval(reduction: float) -> None:
    with pytest.raises(AllocationError, match=r"`0 < reduction <= 0\.\d+` must hold .* got"):
        allocate_curves(topology_of_shapes(), curves_of(0), reduction)
