"""Divergences against a direct computation with full passes and all logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sensitivity_support import FAMILIES, llama, windows

from dse.decomposition import FactorBank, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ModelError, NonFiniteError
from dse.models import LoadedModel
from dse.sensitivity import DivergenceMeter
from dse.sensitivity import divergence_meter as meter


def bank_of(loaded: LoadedModel, tmp_path: Any) -> FactorBank:
    return FactorBank.build(loaded, {"svd": {t.name: 6 for t in loaded.topology.tensors}}, folder=tmp_path)


def point_of(loaded: LoadedModel, layer: int, rank: int = 3) -> DesignPoint:
    names = [t.name for t in loaded.topology.tensors if t.layer == layer]
    return DesignPoint.of({names[0]: TensorChoice("svd", rank), names[-1]: TensorChoice("svd", rank)})


@torch.inference_mode()
def log_probabilities(loaded: LoadedModel, text: torch.Tensor) -> torch.Tensor:
    return loaded.model(input_ids=text).logits.double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergences_equal_those_of_full_passes_and_all_logits(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, text = FAMILIES[family](), windows()
    monkeypatch.setattr(meter, "_BATCH_TOKENS", 32)  # three batches
    bank = bank_of(loaded, tmp_path)
    before = log_probabilities(loaded, text)
    found = DivergenceMeter(loaded, text, bank)
    weights = [p.clone() for p in loaded.model.parameters()]
    points = [(layer, point_of(loaded, layer)) for layer in range(loaded.topology.layer_count)]
    points += [(b.layer, DesignPoint.of({b.name: TensorChoice.removal()})) for b in loaded.topology.blocks]
    for layer, point in sorted(points, key=lambda entry: entry[0]):
        divergence = found.measure(point, layer)
        with decompose(loaded, point, bank):
            after = log_probabilities(loaded, text)
        by_window = (before.exp() * (before - after)).sum(-1).mean(-1).numpy()
        next_token = [p[:, :-1].gather(-1, text[:, 1:, None]).mean() for p in (before, after)]
        assert divergence.kl_divergence == pytest.approx(by_window.mean(), rel=1e-4)
        assert divergence.kl_standard_error == pytest.approx(by_window.std(ddof=1) / np.sqrt(len(text)), rel=1e-3)
        assert divergence.log_likelihood_drop == pytest.approx(float(next_token[0] - next_token[1]), abs=1e-5)
        assert divergence.kl_divergence > 1e-4
        assert found.measure(point) == pytest.approx(divergence)
    assert found.uses_stored_states
    for ours, theirs in zip(weights, loaded.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_small_changes_are_distinguished_from_none(tiny: LoadedModel, tmp_path: Any) -> None:
    # A difference of two sums of 64 terms: its rounding error must be far below the smallest divergence of interest.
    found = DivergenceMeter(tiny, windows(), bank_of(tiny, tmp_path))
    assert found.measure(DesignPoint.dense(), 0).kl_divergence == pytest.approx(0.0, abs=1e-6)
    text, change = windows(), 1e-3
    before = log_probabilities(tiny, text)
    with torch.no_grad():
        tiny.model.model.layers[3].mlp.up_proj.weight.mul_(1 + change)
    after = log_probabilities(tiny, text)
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert 1e-8 < expected < 1e-4
    assert found.measure(DesignPoint.dense(), 3).kl_divergence == pytest.approx(expected, abs=1e-6)


def test_layers_out_of_order_need_a_full_pass(tiny: LoadedModel, tmp_path: Any) -> None:
    bank = bank_of(tiny, tmp_path)
    found = DivergenceMeter(tiny, windows(), bank)
    point = point_of(tiny, 1)
    first = found.measure(point, 1)
    found.measure(point_of(tiny, 3), 3)
    assert found.measure(point, 1) == pytest.approx(first)
    assert found.uses_stored_states


def test_layers_that_pass_on_more_than_their_output_are_detected(tmp_path: Any) -> None:
    # Layer 3 reads the output of layer 0's MLP, as in models that share keys and values between layers.
    loaded = llama()
    kept: dict[str, torch.Tensor] = {}
    layers = loaded.model.model.layers
    loaded.model.model.register_forward_pre_hook(lambda *_: kept.clear())
    layers[0].mlp.register_forward_hook(lambda _m, _i, output: kept.update(mlp=output))
    layers[3].mlp.register_forward_hook(lambda _m, _i, output: output + kept["mlp"])
    bank = bank_of(loaded, tmp_path)
    found = DivergenceMeter(loaded, windows(), bank)
    before = log_probabilities(loaded, windows())
    for layer in (0, 2, 3):
        point = point_of(loaded, layer)
        divergence = found.measure(point, layer)
        with decompose(loaded, point, bank):
            after = log_probabilities(loaded, windows())
        assert divergence.kl_divergence == pytest.approx(
            float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4
        )
    assert not found.uses_stored_states
    assert all("forward" not in vars(layer) for layer in layers)


def test_non_finite_outputs_and_transformed_logits_are_refused(tiny: LoadedModel, tmp_path: Any) -> None:
    bank = bank_of(tiny, tmp_path)
    found = DivergenceMeter(tiny, windows(), bank)
    with torch.no_grad():
        tiny.model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="must be finite"):
        found.measure(point_of(tiny, 0), 0)
    bent = llama()
    bent.model.register_forward_hook(lambda _m, _i, output: type(output)(logits=3 * output.logits))
    with pytest.raises(ModelError, match="logits are the output of its head"):
        DivergenceMeter(bent, windows(), bank)
