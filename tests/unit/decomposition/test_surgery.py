from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dse.cost import point_cost
from dse.decomposition import FactorBank, LowRankLinear, apply_point, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError, RankError
from dse.models import LoadedModel

TOKENS = torch.arange(12).reshape(2, 6)


def state(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def assert_bit_identical(loaded: LoadedModel, before: dict[str, torch.Tensor]) -> None:
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    fixture: LoadedModel = request.getfixturevalue(request.param)
    return fixture


@pytest.mark.parametrize("method", ["svd", "tucker", "tucker_merged"])
def test_the_decomposed_model_equals_one_with_merged_weights(model: LoadedModel, method: str, tmp_path: Path) -> None:
    """An applied point gives the same outputs as dense weights replaced by the products of the factors."""
    point = DesignPoint.uniform(model.topology, method, 3, [1])
    bank = FactorBank.build(model, [point], folder=tmp_path)
    before = state(model)
    dense_logits = model.model(TOKENS).logits
    with decompose(model, point, bank):
        logits = model.model(TOKENS).logits
        counted = sum(p.numel() for p in {id(p): p for p in model.model.parameters()}.values())
        assert counted == point_cost(model.topology, point).parameters
        for name, _ in point:
            assert isinstance(model.model.get_submodule(model.topology[name].module), LowRankLinear)
    assert_bit_identical(model, before)
    assert torch.equal(model.model(TOKENS).logits, dense_logits)
    for name, choice in point:
        tensor = model.topology[name]
        weight = model.model.get_submodule(tensor.module).weight
        product = bank.factors(name, choice).product()
        weight.data.copy_(product.T if tensor.kind == "conv1d" else product)
    torch.testing.assert_close(model.model(TOKENS).logits, logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(dense_logits, logits, atol=1e-3)


def test_the_point_is_undone_when_the_block_raises(llama: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(llama.topology, "svd", 2, [0, 2])
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    before = state(llama)
    with pytest.raises(RuntimeError, match="boom"), decompose(llama, point, bank):
        raise RuntimeError("boom")
    assert_bit_identical(llama, before)


def test_baseline_and_candidate_can_be_swapped_and_undone(llama: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(llama.topology, "svd", 2, [1])
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    dense = llama.model(TOKENS).logits
    handle = apply_point(llama.model, llama.topology, point, bank)
    low_rank = llama.model(TOKENS).logits
    handle.use_baseline()
    assert not handle.is_applied
    assert torch.equal(llama.model(TOKENS).logits, dense)
    handle.use_candidate()
    assert handle.is_applied
    assert torch.equal(llama.model(TOKENS).logits, low_rank)
    handle.undo()
    assert torch.equal(llama.model(TOKENS).logits, dense)


def test_every_problem_is_reported_and_nothing_is_changed(llama: LoadedModel, tmp_path: Path) -> None:
    good = DesignPoint.uniform(llama.topology, "svd", 2, [1])
    bank = FactorBank.build(llama, [good], folder=tmp_path)
    before = state(llama)
    bad = DesignPoint.of(
        {
            "layers.1.query": TensorChoice("svd", 2),
            "layers.9.query": TensorChoice("svd", 2),
            "layers.0.up": TensorChoice("svd", 20),
        }
    )
    with pytest.raises(PointError) as error:
        apply_point(llama.model, llama.topology, bad, bank)
    assert "2 problems" in str(error.value)
    assert "layers.9.query" in str(error.value)
    assert "`rank <= 19` must hold for 'layers.0.up'" in str(error.value)
    assert_bit_identical(llama, before)


def test_rank_problems_alone_raise_rank_error(llama: LoadedModel, tmp_path: Path) -> None:
    bank = FactorBank.build(llama, [], folder=tmp_path)
    with pytest.raises(RankError, match="break-even of 32 x 32"):
        apply_point(llama.model, llama.topology, DesignPoint.of({"layers.0.query": TensorChoice("svd", 17)}), bank)


def test_a_factor_missing_from_the_bank_leaves_the_model_unchanged(llama: LoadedModel, tmp_path: Path) -> None:
    bank = FactorBank.build(llama, [DesignPoint.uniform(llama.topology, "svd", 2, [1])], folder=tmp_path)
    before = state(llama)
    with pytest.raises(PointError, match=r"`rank <= 2` must hold .* in this factor bank, but got rank=5"):
        apply_point(llama.model, llama.topology, DesignPoint.uniform(llama.topology, "svd", 5, [1]), bank)
    assert_bit_identical(llama, before)


def test_a_point_cannot_be_applied_twice(llama: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(llama.topology, "svd", 2, [1])
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    with decompose(llama, point, bank), pytest.raises(PointError, match="decomposed already"):
        apply_point(llama.model, llama.topology, point, bank)


def test_a_topology_of_another_model_is_refused(llama: LoadedModel, gpt2: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(llama.topology, "svd", 2, [1])
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    with pytest.raises(PointError, match="another model"):
        apply_point(gpt2.model, llama.topology, point, bank)
    widened = tuple(dataclasses.replace(t, out_features=t.out_features + 1) for t in llama.topology.tensors)
    with pytest.raises(PointError, match="another model"):
        apply_point(llama.model, dataclasses.replace(llama.topology, tensors=widened), point, bank)


def test_factors_get_the_dtype_of_the_weight(llama: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(llama.topology, "svd", 2, [1])
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    llama.model.to(torch.bfloat16)
    with decompose(llama, point, bank):
        module = llama.model.get_submodule(llama.topology["layers.1.query"].module)
        assert module.left.weight.dtype == torch.bfloat16
        assert llama.model(TOKENS).logits.dtype == torch.bfloat16


def test_biases_are_kept(gpt2: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(gpt2.topology, "svd", 2, [0], ["up"])
    bank = FactorBank.build(gpt2, [point], folder=tmp_path)
    module = gpt2.model.get_submodule(gpt2.topology["layers.0.up"].module)
    with decompose(gpt2, point, bank):
        swapped = gpt2.model.get_submodule(gpt2.topology["layers.0.up"].module)
        assert swapped.bias is module.bias
