"""Truncation errors, and divergence curves of tensors and blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sensitivity_support import FAMILIES, windows

from dse.cost import break_even_rank, factor_parameters, has_core
from dse.decomposition import CalibrationWindows, FactorBank
from dse.decomposition.factors import as_matrix
from dse.design_point import DesignPoint, TensorChoice
from dse.model_parts import DecomposableTensor
from dse.models import LoadedModel
from dse.sensitivity.layer_blocks import blocks_of_topology
from dse.sensitivity.sensitivity_curves import (
    BlockCurve,
    TensorCurve,
    best_split,
    profiled_ranks,
    rank_of_kept_fraction,
    split_table,
)
from dse.sensitivity.truncation import truncation_errors


@pytest.mark.parametrize("method", ["svd", "whitened_svd", "tucker"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_errors_at_every_rank_equal_those_of_the_factors(family: str, method: str, tmp_path: Any) -> None:
    loaded, text = FAMILIES[family](), windows()
    limits = {m.name: break_even_rank(*m.shape, core=has_core(method)) for m in loaded.topology.matrices}
    bank = FactorBank.build(
        loaded, {method: limits}, CalibrationWindows(windows(20, seed=2), "f" * 16, "test"), folder=tmp_path
    )
    largest = {name: TensorChoice(method, rank) for name, rank in limits.items()}
    found = truncation_errors(loaded, largest, bank, [text[:4], text[4:]])
    inputs: dict[str, torch.Tensor] = {}
    matrices = {m.name: m for m in loaded.topology.matrices if m.layer == 1}
    names = list(matrices)
    modules = {name: loaded.model.get_submodule(matrix.modules[0]) for name, matrix in matrices.items()}

    def see(name: str, _module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        inputs[name] = arguments[0].flatten(0, 1).double()

    handles = [module.register_forward_pre_hook(partial(see, name)) for name, module in modules.items()]
    loaded.model(input_ids=text)
    for name in names:
        errors, x = found[name], inputs[name]
        assert errors.shape == (limits[name] + 1,)
        assert errors[0] == pytest.approx(1.0)
        assert (np.diff(errors) <= 0).all()
        weight = torch.cat([as_matrix(loaded.model.get_submodule(path)) for path in matrices[name].modules]).double()
        for rank in (1, 3, limits[name]):
            product = bank.factors(name, TensorChoice(method, rank)).product().double()
            expected = float((x @ (weight - product).T).square().sum() / (x @ weight.T).square().sum())
            # Curves are non-increasing; without whitening the error of a rank may be above the curve.
            assert errors[rank] <= expected + 1e-5
            if method == "whitened_svd":
                assert errors[rank] == pytest.approx(expected, abs=0.02)
    for handle in handles:
        handle.remove()


TENSOR = DecomposableTensor("layers.0.up", "m", 0, "up", 64, 32)


def curve(name: str = "layers.0.up", divergence: float = 0.5, decay: float = 0.8) -> TensorCurve:
    tensor = DecomposableTensor(name, name, 0, name.rpartition(".")[2], 64, 32)
    return TensorCurve(tensor, "svd", decay ** np.arange(break_even_rank(64, 32) + 1), 10, divergence)


def test_a_tensor_curve_passes_through_its_measurement() -> None:
    found = curve()
    assert found.at(10) == pytest.approx(0.5)
    assert found.at(11) == pytest.approx(0.5 * 0.8**1.15)
    assert found.at(8) == pytest.approx(0.5 / 0.64**1.15)
    assert found.at(0) > found.at(1) > found.at(21) > 0


def test_profiled_ranks_are_multiples_that_save_parameters() -> None:
    assert profiled_ranks(TENSOR, "svd", 8) == (8, 16)
    assert profiled_ranks(TENSOR, "svd", 1)[-1] == 21  # 21 x 96 < 2048 <= 22 x 96
    assert profiled_ranks(TENSOR, "svd", 64) == (21,)
    assert rank_of_kept_fraction(TENSOR, "svd", 0.5, 1) == 10
    assert rank_of_kept_fraction(TENSOR, "svd", 0.5, 8) == 8
    assert rank_of_kept_fraction(TENSOR, "svd", 0.01, 4) == 4
    for rank in profiled_ranks(TENSOR, "tucker", 1):
        assert factor_parameters(TENSOR, TensorChoice("tucker", rank)) < TENSOR.parameters


def test_a_split_reduces_the_least_sensitive_tensor() -> None:
    table = split_table([curve("layers.0.gate", 1.0), curve("layers.0.up", 0.01)], 1)
    choices = best_split(table, 0.6)
    assert choices is not None
    assert [name for name, _ in choices] == ["layers.0.up"]
    assert table.divergence_of(DesignPoint(choices)) < 0.1
    assert best_split(table, 1e-6) is None
    even = best_split(split_table([curve("layers.0.gate"), curve("layers.0.up")], 1), 0.5)
    assert even is not None
    ranks = [choice.rank for _, choice in even]
    assert abs(ranks[0] - ranks[1]) <= 1


def test_a_block_curve_passes_through_its_measurements() -> None:
    found = BlockCurve.of([(0.4, 0.2), (0.1, 0.1), (1.6, 1.6)])
    assert [found.at(p) for p in (0.1, 0.4, 1.6)] == pytest.approx([0.1, 0.2, 1.6])
    assert found.at(0.2) == pytest.approx(0.2 * np.sqrt(0.5))  # halfway on the logarithmic scale
    assert found.at(0.01) == pytest.approx(0.01)
    assert found.at(3.2) == pytest.approx(3.2)
    assert BlockCurve.of([]).at(0.3) == 0.3


def test_blocks_of_a_model(tiny: LoadedModel) -> None:
    blocks = blocks_of_topology(tiny.topology)
    assert [b.name for b in blocks[:3]] == ["layers.0.attention", "layers.0.mlp", "layers.1.attention"]
    assert [t.role for t in blocks[0].tensors] == ["query", "key", "value", "attention_output"]
    assert blocks[1].parameters == 3 * 32 * 48
    some = blocks_of_topology(tiny.topology, {"layers.2.up", "layers.2.down"})
    assert [(b.name, len(b.tensors)) for b in some] == [("layers.2.mlp", 2)]
