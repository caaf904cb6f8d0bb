from __future__ import annotations

import numpy as np
import pytest

from dse.cost import point_cost
from dse.models import LoadedModel
from dse.sensitivity import expected_table
from dse.sensitivity.allocation import allocate
from dse.sensitivity.allocation_curves import allocate_curves


def curves_of(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """Convex curves with a different height for each tensor."""
    generator = np.random.default_rng(0)
    return {
        tensor.name: generator.uniform(0.1, 10) * np.linspace(1, 0, min(tensor.shape) + 1) ** 2
        for tensor in loaded.topology.tensors
        if tensor.layer is not None
    }


@pytest.mark.parametrize("reduction", [0.05, 0.15])
def test_allocations_are_near_those_over_the_curves(tiny: LoadedModel, reduction: float) -> None:
    curves = curves_of(tiny)
    table = expected_table(tiny.topology, curves)
    found = allocate(table, reduction=reduction)
    assert point_cost(tiny.topology, found.point).reduction == pytest.approx(found.reduction)
    assert found.reduction >= reduction
    summed = sum(float(curves[name][choice.rank]) for name, choice in found.point)
    assert found.divergence == pytest.approx(summed)
    least = allocate_curves(tiny.topology, curves, reduction).divergence
    assert 0.9 * least <= found.divergence <= 1.3 * least


def test_removals_are_options_only_on_request(tiny: LoadedModel) -> None:
    curves = curves_of(tiny)
    removed = [u for u in expected_table(tiny.topology, curves, removal=True).units if u.options[-1].removes_block]
    assert len(removed) == 2 * tiny.topology.layer_count
    assert removed[0].options[-1].divergence == curves["layers.0.attention_output"][0]
    assert removed[1].options[-1].divergence == curves["layers.0.down"][0]
    table = expected_table(tiny.topology, curves, method="fisher_svd_refit", multiple=4)
    choices = [choice for unit in table.units for option in unit.options for _, choice in option.choices]
    assert choices
    assert all(choice.method == "fisher_svd_refit" and choice.rank % 4 == 0 for choice in choices)


def test_widths_compete_with_ranks(tiny: LoadedModel) -> None:
    """MLPs with a curve over widths can keep some channels; those of others cannot."""
    curves = curves_of(tiny)
    curves["layers.1.mlp"] = 1e-3 * np.linspace(1, 0, 49) ** 2
    table = expected_table(tiny.topology, curves, multiple=4)
    narrow = [option for unit in table.units for option in unit.options if option.narrows_mlp]
    assert {name for option in narrow for name, _ in option.choices} == {"layers.1.mlp"}
    for option in narrow:
        ((_, choice),) = option.choices
        assert choice.rank % 4 == 0
        assert option.divergence == curves["layers.1.mlp"][choice.rank]
    found = allocate(table, reduction=0.1)
    assert "layers.1.mlp" in found.point.widths
    assert point_cost(tiny.topology, found.point).reduction == pytest.approx(found.reduction)
