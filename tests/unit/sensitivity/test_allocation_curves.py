"""Allocations over divergence curves against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import topology_of_shapes

from dse.cost import point_cost
from dse.errors import AllocationError
from dse.sensitivity.allocation_curves import allocate_curves

SHAPES = ((6, 6), (4, 8), (9, 5))
TOPOLOGY = topology_of_shapes([{"up": shape} for shape in SHAPES], other=20)


def curves_of(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        f"layers.{i}.up": np.append(np.sort(generator.exponential(size=min(shape)))[::-1].cumsum()[::-1], 0.0)
        for i, shape in enumerate(SHAPES)
    }


def every_combination(curves: dict[str, np.ndarray]) -> list[tuple[int, float]]:
    """(parameters, divergence) of all combinations of dense or a rank that saves parameters, for each tensor."""
    options = []
    for (rows, columns), divergence in zip(SHAPES, curves.values(), strict=True):
        ranks = range(1, (rows * columns - 1) // (rows + columns) + 1)
        options.append([(rows * columns, 0.0), *((r * (rows + columns), float(divergence[r])) for r in ranks)])
    return [(sum(p for p, _ in chosen), sum(d for _, d in chosen)) for chosen in itertools.product(*options)]


@given(seed=st.integers(0, 10_000), reduction=st.floats(0.02, 0.55))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_met_with_a_divergence_within_one_step_of_the_optimum(seed: int, reduction: float) -> None:
    topology, curves = TOPOLOGY, curves_of(seed)
    found = allocate_curves(topology, curves, reduction)
    arithmetic = point_cost(topology, found.point)
    assert found.reduction == pytest.approx(arithmetic.reduction)
    assert found.reduction >= reduction - 1e-12
    budget = topology.parameters_dense * (1 - reduction) - 20
    best = min(divergence for parameters, divergence in every_combination(curves) if parameters <= budget)
    # The duality gap is at most one tensor's step.
    steps = max(float(np.abs(np.diff(divergence[1:])).max()) for divergence in curves.values())
    dense_steps = max(float(divergence[(len(divergence) - 1) // 2]) for divergence in curves.values())
    assert found.divergence <= best + steps + dense_steps


def test_the_less_sensitive_tensor_is_reduced_first() -> None:
    """A tensor with a hundredth of the divergence is reduced to rank 1 before the other changes."""
    topology = topology_of_shapes([{"up": (8, 8)}] * 2, other=0)
    shape = np.linspace(1, 0, 9)
    found = allocate_curves(topology, {"layers.0.up": 100 * shape, "layers.1.up": shape}, 0.3)
    assert list(found.point.by_name) == ["layers.1.up"]
    assert found.point.by_name["layers.1.up"].rank == 1


def test_ranks_are_multiples_and_use_the_method() -> None:
    found = allocate_curves(TOPOLOGY, curves_of(1), 0.25, method="whitened_svd", multiple=2)
    assert {choice.method for _, choice in found.point} == {"whitened_svd"}
    assert all(choice.rank % 2 == 0 for _, choice in found.point)


@pytest.mark.parametrize("reduction", [0.0, -0.1, 0.95])
def test_an_unreachable_budget_is_refused_with_the_reachable_interval(reduction: float) -> None:
    with pytest.raises(AllocationError, match=r"`0 < reduction <= 0\.\d+` must hold .* got"):
        allocate_curves(TOPOLOGY, curves_of(0), reduction)
