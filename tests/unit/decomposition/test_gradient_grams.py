"""Gradient Gram matrices against the exact expectation over all labels, computed without sampling or hooks."""

from __future__ import annotations

import math

import pytest
import torch
from decomposition_support import some_windows, windows_of
from tiny_models import tiny_model

from dse.decomposition import CalibrationWindows, FactorBank, GradientGrams
from dse.design_point import DesignPoint
from dse.errors import CalibrationError
from dse.models import LoadedModel, topology_of


def grams_of(loaded: LoadedModel, names: tuple[str, ...], windows: CalibrationWindows, **budget: int) -> list:
    grams = GradientGrams(loaded.model, loaded.topology, names, windows, **budget)
    return [grams.take(name) for name in names]


def expected_gram(loaded: LoadedModel, name: str, token_ids: torch.Tensor) -> torch.Tensor:
    """E over labels of g g^T for one tensor: one backward pass for every label of every position.

    Labels of different positions are drawn independently and the mean gradient with respect to the logits is zero, so
    cross terms vanish and positions add up.
    """
    module = loaded.model.get_submodule(loaded.topology[name].module)
    outputs: list[torch.Tensor] = []

    def begin(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output.requires_grad_())
        return output

    handle = module.register_forward_hook(begin)
    logs = torch.log_softmax(loaded.model(token_ids).logits, -1)
    handle.remove()
    gram = torch.zeros(outputs[0].shape[-1], outputs[0].shape[-1])
    for window in range(logs.shape[0]):
        for position in range(logs.shape[1]):
            for label in range(logs.shape[2]):
                one = logs[window, position, label]
                (gradient,) = torch.autograd.grad(one, outputs[0], retain_graph=True)
                rows = gradient.reshape(-1, gradient.shape[-1])
                gram += one.exp().detach() * rows.T @ rows
    return gram / token_ids.numel()


@pytest.mark.parametrize("name", ["layers.1.query", "layers.2.gate", "layers.2.down"])
def test_sampled_labels_estimate_the_expectation_over_labels(llama: LoadedModel, name: str) -> None:
    torch.manual_seed(1)
    token_ids = torch.randint(64, (1, 4))
    expected = expected_gram(llama, name, token_ids)
    (found,) = grams_of(llama, (name,), windows_of(token_ids.repeat(1024, 1)))  # 1024 draws of every label
    assert float((found - expected).norm() / expected.norm()) < 0.2
    assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=0.1)


def test_gradients_do_not_depend_on_the_group_size(llama: LoadedModel) -> None:
    names = tuple(tensor.name for tensor in llama.topology.tensors)
    at_once, one_by_one = (grams_of(llama, names, some_windows(), budget_bytes=size) for size in (2**30, 1))
    for a, b in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-4)
        assert torch.equal(a, a.T) or torch.allclose(a, a.T, atol=1e-9)
        assert float(a.diagonal().min()) >= 0


def test_long_calibration_text_is_subsampled_over_all_sources(llama: LoadedModel) -> None:
    first, last = torch.zeros(64, 128, dtype=torch.int64), torch.ones(64, 128, dtype=torch.int64)
    both = torch.cat((first, last))
    evenly = windows_of(torch.cat((first[:32], last[:32])))
    name = ("layers.1.value",)
    (thinned,), (expected,) = grams_of(llama, name, windows_of(both)), grams_of(llama, name, evenly)
    torch.testing.assert_close(thinned, expected, atol=1e-9, rtol=1e-3)


def test_the_model_is_unchanged(llama: LoadedModel) -> None:
    probe = torch.arange(12)[None]
    before = llama.model(probe).logits
    grams_of(llama, ("layers.0.key",), some_windows())
    assert torch.equal(llama.model(probe).logits, before)
    assert not llama.model(probe).logits.requires_grad
    assert all(parameter.grad is None for parameter in llama.model.parameters())


def test_a_bank_of_fisher_factors_can_be_built_for_decoders(llama: LoadedModel, gpt2: LoadedModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for loaded in (llama, gpt2):
        point = DesignPoint.uniform(loaded.topology, "fisher_svd", 4)
        bank = FactorBank.build(loaded, [point], some_windows(), folder=tmp_path)
        for name, choice in point:
            factors = bank.factors(name, choice)
            assert (factors.left.shape[0], factors.right.shape[1]) == loaded.topology[name].shape
            assert bool(torch.isfinite(factors.product()).all())
        with pytest.raises(CalibrationError, match="needs calibration text"):
            FactorBank.build(loaded, [point], None, folder=tmp_path / "none")


@pytest.mark.parametrize("head", ["masked_lm", "classification", "embedding"])
def test_every_head_has_gradients(head: str) -> None:
    model = tiny_model("bert", head=head, vocab_size=64, num_hidden_layers=2, num_labels=3)
    topology = topology_of(model)
    names = tuple(t.name for t in topology.tensors if t.layer is not None)
    grams = GradientGrams(model, topology, names, some_windows())
    for name in names:
        trace = float(grams.take(name).trace())
        assert math.isfinite(trace)
        assert trace > 0
