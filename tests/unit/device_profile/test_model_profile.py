"""Sums of products by closed forms: the seconds of a product are scripted, never taken from a clock."""

from __future__ import annotations

import pytest
import torch
from scripted_timings import START_S

from dse.decomposition import apply_point
from dse.design_point import DesignPoint, TensorChoice
from dse.measurement.device_profile import model_profile
from dse.measurement.device_profile.model_profile import Phase
from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings
from dse.runtime.forms import FormChoice, build_forms
from dse.runtime.products import Product

DECODE, PREFILL = Phase.of("decode", 2, 8), Phase.of("prefill", 2, 8)
# Width 32, MLP 48, key and value 16, vocabulary 18: per layer query-key-value, output, gate-up, down; then the head.
LAYER = 32 * 64 + 32 * 32 + 32 * 96 + 48 * 32
HEAD = 32 * 18


def test_dense_seconds_are_the_sum_over_shared_inputs(profile):
    assert profile.seconds(DesignPoint.dense(), DECODE) == 2 * (3 * LAYER + HEAD) + 13 * START_S
    # The head multiplies the last position of each sequence alone.
    assert profile.seconds(DesignPoint.dense(), PREFILL) == 16 * 3 * LAYER + 2 * HEAD + 13 * START_S


@pytest.mark.parametrize(
    ("choices", "entries", "products"),
    [
        ({"layers.0.key": ("svd", 4)}, LAYER - 16 * 32 + 4 * (32 + 16), 5),
        ({"layers.0.key": ("tucker", 4)}, LAYER - 16 * 32 + 4 * (32 + 16) + 16, 6),
        ({"layers.0.gate_up": ("svd", 5)}, LAYER - 96 * 32 + 5 * (32 + 96), 5),
        ({"layers.0.mlp": ("removed", 0)}, 32 * 64 + 32 * 32, 2),
        ({"layers.0.down": ("svd", 3), "layers.0.attention": ("removed", 0)}, 32 * 96 + 3 * (48 + 32), 3),
    ],
)
def test_a_point_costs_what_its_form_multiplies(profile, loaded, choices, entries, products):
    point = DesignPoint.of({name: TensorChoice(*choice) for name, choice in choices.items()})
    expected = 2 * (2 * LAYER + HEAD + entries) + (9 + products) * START_S
    assert profile.seconds(point, DECODE) == expected


def test_the_sum_holds_the_very_products_that_the_form_runs(profile, loaded):
    """Against the modules that are built, not against the arithmetic."""

    class Random:
        def factors(self, name, choice):
            from dse.decomposition import LowRankFactors

            rows, columns = loaded.topology.matrix(name).shape
            return LowRankFactors(torch.randn(rows, choice.rank) / 99, torch.randn(choice.rank, columns))

    choices = {"layers.0.query_key_value": 7, "layers.1.gate": 3, "layers.1.down": 4, "layers.2.value": 2}
    point = DesignPoint.of({name: TensorChoice("svd", rank) for name, rank in choices.items()})
    applied = apply_point(loaded.model, loaded.topology, point, Random())
    try:
        forms, _ = build_forms(loaded.model, FormChoice(lambda shapes: ["row_major"] * len(shapes)))
    finally:
        applied.undo()
    built = {
        id(module): module for swap in forms.swaps for module in swap.form.modules() if isinstance(module, Product)
    }
    shapes = [ProductShape(2, *module.weight_data.shape) for module in built.values()]
    assert sorted(map(str, shapes)) == sorted(map(str, profile.shapes(point, DECODE)))


def test_only_what_is_faster_is_kept(profile):
    """A chain pays for one more product: rank 4 of down saves 2 x (1536 - 4 x 80) > 1000, rank 14 does not."""
    slow, fast = TensorChoice("svd", 14), TensorChoice("svd", 4)
    assert profile.is_faster("layers.0.down", fast, DECODE)
    assert not profile.is_faster("layers.0.down", slow, DECODE)
    assert profile.is_faster("layers.0.down", slow, PREFILL)
    removal = TensorChoice.removal()
    point = DesignPoint.of({"layers.0.down": fast, "layers.1.down": slow, "layers.2.mlp": removal})
    kept = DesignPoint.of({"layers.0.down": fast, "layers.2.mlp": removal})
    assert profile.only_faster(point, [DECODE]) == kept
    assert profile.only_faster(point, [DECODE, PREFILL]) == kept
    assert profile.only_faster(point, [PREFILL]) is point


def test_a_prediction_is_dense_less_what_the_products_save(profile):
    dense, point = DesignPoint.dense(), DesignPoint.of({"layers.0.down": TensorChoice("svd", 4)})
    saved = profile.seconds(dense, DECODE) - profile.seconds(point, DECODE)
    assert saved == 2 * (48 * 32 - 4 * (48 + 32)) - START_S
    whole = 2 * profile.seconds(dense, DECODE)
    assert profile.predicted_seconds(point, DECODE, whole) == whole - saved
    # Half of that pass is no product: seven shares, of three layers' two blocks and of what lies outside them.
    topology = profile.topology
    removed = DesignPoint.of({"layers.1.mlp": TensorChoice.removal()})
    assert len(topology.blocks) == 6
    gone = profile.seconds(dense, DECODE) - profile.seconds(removed, DECODE)
    assert profile.predicted_seconds(removed, DECODE, whole) == pytest.approx(whole - gone - whole / 2 / 7)
    everything = DesignPoint.of({block.name: TensorChoice.removal() for block in topology.blocks})
    head = profile.seconds(everything, DECODE)
    assert profile.predicted_seconds(everything, DECODE, whole) == pytest.approx(whole / 2 / 7 + head)
    # A pass that took half of what its products take alone: they are taken to be twice as fast in it.
    half = profile.seconds(dense, DECODE) / 2
    assert profile.predicted_seconds(point, DECODE, half) == pytest.approx(half - saved / 2)
    assert profile.predicted_seconds(dense, DECODE, 1e-9) == 1e-9
    assert 0 < profile.predicted_seconds(point, DECODE, 1e-9) < 1e-9


def test_missing_are_those_without_a_timing_each_once(loaded, tmp_path):
    timings = ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    profile = model_profile(loaded, timings)
    shapes = profile.shapes(DesignPoint.dense(), DECODE)
    assert len(profile.missing(shapes)) == 5  # four in every layer, and the head
    timings.best_seconds(shapes[0])
    assert len(profile.missing(shapes)) == 4
