"""Sums of products in closed form; the seconds of a product are scripted and never come from a clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripted_timings import START_S
from tiny_models import loaded_tiny_model
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dse.decomposition import LowRankFactors, apply_point
from dse.design_point import DesignPoint, TensorChoice
from dse.measurement.device_profile import ModelProfile, Phase, ProductShape, ProductTimings, profile_model
from dse.measurement.device_profile.model_profile import ModelMatrix, model_matrices
from dse.models import LoadedModel, load_model

DECODE, PREFILL = Phase.of("decode", 2, 8), Phase.of("prefill", 2, 8)
# Width 32, MLP 48, key and value 16, vocabulary 18: seven matrices in each of three layers, then the head.
LAYER = 32 * 64 + 32 * 32 + 32 * 96 + 48 * 32
HEAD = 32 * 18
DENSE_PRODUCTS = 3 * 7 + 1


def test_dense_seconds_are_the_sum_over_all_matrices(profile: ModelProfile) -> None:
    assert profile.seconds(DesignPoint.dense(), DECODE) == 2 * (3 * LAYER + HEAD) + DENSE_PRODUCTS * START_S
    # The head multiplies the last position of each sequence only.
    assert profile.seconds(DesignPoint.dense(), PREFILL) == 16 * 3 * LAYER + 2 * HEAD + DENSE_PRODUCTS * START_S


@pytest.mark.parametrize(
    ("choices", "entries", "products"),
    [
        ({"layers.0.key": ("svd", 4)}, LAYER - 16 * 32 + 4 * (32 + 16), 8),
        ({"layers.0.key": ("tucker", 4)}, LAYER - 16 * 32 + 4 * (32 + 16) + 16, 9),
        # Members of a stack share the right factor (and the core).
        ({"layers.0.gate_up": ("svd", 5)}, LAYER - 96 * 32 + 5 * (32 + 96), 8),
        ({"layers.0.gate_up": ("tucker", 5)}, LAYER - 96 * 32 + 5 * (32 + 96) + 25, 9),
        ({"layers.0.mlp": ("removed", 0)}, 32 * 64 + 32 * 32, 4),
        # An MLP of reduced width has three smaller dense products.
        ({"layers.0.mlp": ("width", 20)}, LAYER - 3 * 28 * 32, 7),
        ({"layers.0.down": ("svd", 3), "layers.0.attention": ("removed", 0)}, 32 * 96 + 3 * (48 + 32), 4),
    ],
)
def test_a_point_costs_its_own_products(
    profile: ModelProfile, choices: dict[str, tuple[str, int]], entries: int, products: int
) -> None:
    point = DesignPoint.of({name: TensorChoice(*choice) for name, choice in choices.items()})
    expected = 2 * (2 * LAYER + HEAD + entries) + (15 + products) * START_S
    assert profile.seconds(point, DECODE) == expected


class RecordedProducts(TorchFunctionMode):
    """Records the shape of every weight that `functional.linear` multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[ProductShape] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.linear:
            x, weight = args[:2]
            self.shapes.append(ProductShape(x.numel() // x.shape[-1], *weight.shape))
        return func(*args, **(kwargs or {}))


class RandomFactors:
    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        rows, columns = self._loaded.topology.matrix(name).shape
        core = torch.randn(choice.rank, choice.rank) if choice.method == "tucker" else None
        return LowRankFactors(torch.randn(rows, choice.rank) / 99, torch.randn(choice.rank, columns), core)


def test_the_profile_holds_exactly_the_products_that_the_model_runs(profile: ModelProfile, loaded: LoadedModel) -> None:
    """Compared with the products recorded during a forward pass, not with the arithmetic of the profile."""
    choices = {
        "layers.0.query_key_value": TensorChoice("svd", 7),
        "layers.1.gate": TensorChoice("svd", 3),
        "layers.1.down": TensorChoice("tucker", 4),
        "layers.2.value": TensorChoice("svd", 2),
        "layers.2.up": TensorChoice("svd", 5, form="pivoted"),
        "layers.2.down": TensorChoice("svd", 5, form="pivoted"),
    }
    point = DesignPoint.of(choices)
    applied = apply_point(loaded.model, loaded.topology, point, RandomFactors(loaded))
    try:
        with torch.inference_mode(), RecordedProducts() as recorded:
            loaded.model(torch.ones(2, 1, dtype=torch.long), logits_to_keep=1)
    finally:
        applied.undo()
    expected = profile.shapes(point, DECODE)
    assert sorted(shape.reordered for shape in expected if shape.reordered) == [32, 32]  # up's inputs, down's outputs
    assert sorted(map(str, recorded.shapes)) == sorted(str(replace(shape, reordered=0)) for shape in expected)


def test_a_module_called_twice_per_pass_is_left_out(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder / "model"))
    assert len(model_matrices(loaded)) == DENSE_PRODUCTS
    layers = loaded.model.model.layers
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    names = {matrix.tensor for matrix in model_matrices(loaded)}
    assert "layers.0.up" in names
    assert not {"layers.0.down", "layers.1.down"} & names


def test_weights_of_gpt2_are_timed_as_they_are_stored() -> None:
    matrices = model_matrices(loaded_tiny_model("gpt2", n_inner=None))
    assert ModelMatrix("layers.0.down", 32, 128, is_transposed=True) in matrices
    assert ModelMatrix(None, 320, 32, is_head=True) in matrices


def test_only_faster_choices_are_kept(profile: ModelProfile) -> None:
    """A decomposition pays for one more product: rank 4 of down saves 2 x (1536 - 4 x 80) > 1000, rank 14 does not."""
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


def test_a_prediction_is_the_dense_latency_minus_what_the_products_save(profile: ModelProfile) -> None:
    dense, point = DesignPoint.dense(), DesignPoint.of({"layers.0.down": TensorChoice("svd", 4)})
    saved = profile.seconds(dense, DECODE) - profile.seconds(point, DECODE)
    assert saved == 2 * (48 * 32 - 4 * (48 + 32)) - START_S
    whole = 2 * profile.seconds(dense, DECODE)
    assert profile.predicted_seconds(point, DECODE, whole) == whole - saved
    # Half of that pass is no product: seven equal shares, for the two blocks of three layers and for the rest.
    topology = profile.topology
    removed = DesignPoint.of({"layers.1.mlp": TensorChoice.removal()})
    assert len(topology.blocks) == 6
    gone = profile.seconds(dense, DECODE) - profile.seconds(removed, DECODE)
    assert profile.predicted_seconds(removed, DECODE, whole) == pytest.approx(whole - gone - whole / 2 / 7)
    everything = DesignPoint.of({block.name: TensorChoice.removal() for block in topology.blocks})
    head = profile.seconds(everything, DECODE)
    assert profile.predicted_seconds(everything, DECODE, whole) == pytest.approx(whole / 2 / 7 + head)
    # A pass that takes half as long as its products alone: they are assumed to run twice as fast within it.
    half = profile.seconds(dense, DECODE) / 2
    assert profile.predicted_seconds(point, DECODE, half) == pytest.approx(half - saved / 2)
    assert profile.predicted_seconds(dense, DECODE, 1e-9) == 1e-9
    assert 0 < profile.predicted_seconds(point, DECODE, 1e-9) < 1e-9


def test_shapes_without_a_timing_are_listed_once(loaded: LoadedModel, tmp_path: Path) -> None:
    profile = profile_model(loaded, ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path))
    shapes = profile.shapes(DesignPoint.dense(), DECODE)
    # Query and output are alike, key and value, gate and up; then down, and the head.
    assert len(profile.missing(shapes)) == 5
    profile.timings.seconds(shapes[0])
    assert len(profile.missing(shapes)) == 4
