"""Latencies of a sensitivity table's options compared with sums over whole points; product timings are scripted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from scripted_timings import ScriptedTimings

from dse.config import parse_search_space
from dse.cost import factor_parameters
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import AllocationError
from dse.measurement.device_profile import ModelProfile, Phase, ProductShape, profile_model
from dse.models import LoadedModel
from dse.search.spaces.prior_table import block_table
from dse.sensitivity.allocation import allocate
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.option_latency import option_shapes, with_latencies
from dse.sensitivity.sensitivity_table import SensitivityTable

SPACE = parse_search_space(
    {
        "name": "t",
        "kind": "depth_profile",
        "methods": ["svd"],
        "ranks": {"kept_fractions": [0.6, 0.2]},
        "widths": True,
        "removal": True,
    }
)
DECODE, PREFILL = Phase.of("decode", 2, 8), Phase.of("prefill", 2, 8)


def table_of(loaded: LoadedModel) -> SensitivityTable:
    return block_table(SPACE, loaded.topology)


@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_latencies_of_blocks_add_up_to_the_products_of_the_point(
    loaded: LoadedModel, profile: ModelProfile, phase: Phase
) -> None:
    table = with_latencies(table_of(loaded), profile, phase)
    assert table.latency_dense_s == profile.seconds(DesignPoint.dense(), phase)
    base = table.latency_dense_s - sum(unit.dense.latency_s or 0.0 for unit in table.units)
    for chosen in itertools.islice(itertools.product(*(unit.options for unit in table.units)), 0, 4000, 37):
        point = DesignPoint(tuple(choice for option in chosen for choice in option.choices))
        total = base + sum(option.latency_s or 0.0 for option in chosen)
        assert total == pytest.approx(profile.seconds(point, phase), rel=1e-12)


def test_an_allocation_is_the_best_of_all_points_within_the_latency_budget(
    loaded: LoadedModel, profile: ModelProfile
) -> None:
    whole = table_of(loaded)
    # Two layers, so that every point can be enumerated.
    few = SensitivityTable(tuple(u for u in whole.units if u.layer != 2), whole.parameters_dense, one_remains=())
    table = with_latencies(few, profile, DECODE)
    dense_s = profile.seconds(DesignPoint.dense(), DECODE)
    listed = [
        (
            sum(o.divergence for o in chosen),
            profile.seconds(DesignPoint(tuple(c for o in chosen for c in o.choices)), DECODE),
        )
        for chosen in itertools.product(*(unit.options for unit in table.units))
    ]
    for share in (0.95, 0.8, 0.6):
        found = allocate(table, latency_s=share * dense_s)
        assert found.latency_s == pytest.approx(profile.seconds(found.point, DECODE))
        assert found.latency_s <= share * dense_s
        assert found.divergence == pytest.approx(min(d for d, s in listed if s <= share * dense_s), rel=1e-4)


def test_a_measured_dense_latency_keeps_the_time_beside_the_products(
    loaded: LoadedModel, profile: ModelProfile
) -> None:
    products = profile.seconds(DesignPoint.dense(), DECODE)
    table = with_latencies(table_of(loaded), profile, DECODE, dense_s=3 * products)
    found = allocate(table, latency_s=2.9 * products)
    assert found.latency_s == pytest.approx(profile.predicted_seconds(found.point, DECODE, 3 * products))
    # Products that take longer alone than the whole pass are scaled down to it.
    table = with_latencies(table_of(loaded), profile, DECODE, dense_s=products / 2)
    found = allocate(table, latency_s=0.4 * products)
    assert found.latency_s == pytest.approx(profile.predicted_seconds(found.point, DECODE, products / 2))


def test_tensors_of_one_layer_each_save_what_they_save_alone(loaded: LoadedModel, profile: ModelProfile) -> None:
    units = []
    for role in ("query", "key"):
        tensor = loaded.topology[f"layers.0.{role}"]
        choice = TensorChoice("svd", 4)
        small = Option(((tensor.name, choice),), factor_parameters(tensor, choice), 0.1)
        units.append(Unit(tensor.name, 0, role, (Option((), tensor.parameters, 0.0), small)))
    table = with_latencies(SensitivityTable(tuple(units), loaded.topology.parameters_dense), profile, PREFILL)
    dense = profile.seconds(DesignPoint.dense(), PREFILL)
    for unit in table.units:
        alone = profile.seconds(DesignPoint(unit.options[1].choices), PREFILL)
        assert (unit.options[1].latency_s or 0) - (unit.dense.latency_s or 0) == pytest.approx(alone - dense)
        assert (unit.dense.latency_s or 0) > 0


def test_the_listed_shapes_are_exactly_those_that_are_added_up(loaded: LoadedModel, tmp_path: Path) -> None:
    asked = set()

    class Recording(ScriptedTimings):
        def seconds(self, shape: ProductShape) -> float:
            asked.add(shape)
            return super().seconds(shape)

    profile = profile_model(loaded, Recording(torch.device("cpu"), torch.float32, 2**20, tmp_path))
    shapes = option_shapes(table_of(loaded), profile, DECODE)
    assert len(set(shapes)) == len(shapes)
    with_latencies(table_of(loaded), profile, DECODE)
    assert asked == set(shapes)


def test_a_unit_without_a_product_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    timings = ScriptedTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    blind = ModelProfile(loaded.topology, (), timings)
    with pytest.raises(AllocationError, match="needs units whose matrices are each used by one matrix product"):
        with_latencies(table_of(loaded), blind, DECODE)
