from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decomposition_support import SHAPES, gradients_of, gram_of, some_windows, weight_of

from dse.decomposition import FactorBank, decompose, expected_divergence, fisher_svd
from dse.decomposition.fisher_svd import fisher_divergence
from dse.models import LoadedModel
from dse.sensitivity.allocation_curves import allocate_curves


@pytest.mark.parametrize("shape", SHAPES)
def test_the_curve_is_half_the_weighted_error_of_the_factors(shape: tuple[int, int]) -> None:
    weight, gram, gradients = weight_of(shape).double(), gram_of(shape[1]).double(), 3e-4 * gradients_of(shape[0])
    metric = gradients.double() + 0.5 * gradients.diagonal().mean() * torch.eye(shape[0], dtype=torch.float64)
    curve = fisher_divergence(weight, gram, gradients)
    assert len(curve) == min(shape) + 1
    for rank in (1, 4, 7):
        residual = weight - fisher_svd(weight, rank, gram, gradients).product()
        expected = 0.5 * torch.trace(metric @ residual @ gram @ residual.T)
        torch.testing.assert_close(curve[rank], expected, atol=1e-10, rtol=1e-3)
    torch.testing.assert_close(curve[0], 0.5 * torch.trace(metric @ weight @ gram @ weight.T), atol=1e-10, rtol=1e-4)
    assert float(curve[-1]) == 0
    assert bool((curve.diff() <= 0).all())


def test_a_tensor_without_gradients_has_no_expected_divergence() -> None:
    assert float(fisher_divergence(weight_of((12, 8)), gram_of(8), torch.zeros(12, 12)).abs().max()) == 0


def test_estimates_are_cached_and_damaged_ones_recomputed(
    llama: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    settings = {"folder": tmp_path, "progress": lambda phase, done, total: calls.append(phase)}
    first = expected_divergence(llama, some_windows(), **settings)
    assert set(first) == {tensor.name for tensor in llama.topology.tensors if tensor.layer is not None}
    spent = len(calls)
    again = expected_divergence(llama, some_windows(), **settings)
    assert len(calls) == spent
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    recomputed = expected_divergence(llama, some_windows(), **settings)
    assert "damaged" in caplog.text
    for name, curve in first.items():
        np.testing.assert_array_equal(again[name], curve)
        np.testing.assert_array_equal(recomputed[name], curve)


def test_the_estimate_is_close_to_a_small_measured_divergence(llama: LoadedModel, tmp_path: Path) -> None:
    """One tensor with a small truncation: the second-order estimate against the measured divergence."""
    windows = some_windows(64)
    name = "layers.2.attention_output"
    curve = {name: expected_divergence(llama, windows, folder=tmp_path)[name]}
    found = allocate_curves(
        llama.topology, curve, 0.4 * llama.topology[name].parameters / llama.topology.parameters_dense
    )
    bank = FactorBank.build(llama, [found.point], windows, folder=tmp_path)
    with torch.no_grad():
        dense = llama.model(windows.token_ids).logits.log_softmax(-1)
        with decompose(llama, found.point, bank):
            logs = llama.model(windows.token_ids).logits.log_softmax(-1)
    measured = float((dense.exp() * (dense - logs)).sum(-1).mean())
    assert 0.3 * found.divergence < measured < 2 * found.divergence
