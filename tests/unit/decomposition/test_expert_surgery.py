"""Tucker-decomposed experts in a model: logits of the reconstructed weights, exact undo, and the factor bank."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import EXPERT_FAMILIES, EXPERT_ROLES, loaded_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from dse.cost import point_cost
from dse.decomposition import (
    FactorBank,
    TuckerExperts,
    TuckerExpertWeight,
    TuckerFactors,
    apply_point,
    decompose,
    tucker_of_experts,
)
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ModelError, PointError, RankError
from dse.models import LoadedModel

TOKENS = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
POINTS = {
    "both": {"rank": 6, "roles": EXPERT_ROLES},
    "gate_up": {"rank": 5, "roles": ["expert_gate_up"], "layers": [0, 2]},
    "down": {"rank": 5, "roles": ["expert_down"]},
    "expert_rank": {"rank": 7, "expert_rank": 2, "roles": EXPERT_ROLES},
    "one_expert_core": {"rank": 4, "expert_rank": 1, "roles": EXPERT_ROLES},
    "full_in_a_matrix_mode": {"rank": 33, "roles": ["expert_gate_up"], "layers": [1]},
    "nearly_the_expert_mode_alone": {"rank": 32, "expert_rank": 2, "roles": ["expert_down"]},
    "rank_one": {"rank": 1, "roles": EXPERT_ROLES},
}


class OwnFactors:
    """Decomposes the model's own experts on request."""

    def __init__(self, own: LoadedModel) -> None:
        self._weights = {
            t.name: own.model.get_submodule(t.module).get_parameter(t.parameter).detach() for t in own.topology.experts
        }
        self._topology = own.topology

    def factors(self, name: str, choice: TensorChoice) -> None:
        raise AssertionError("no matrix is decomposed here")

    def expert_factors(self, name: str, choice: TensorChoice) -> TuckerFactors:
        ranks = self._topology.experts_by_name[name].ranks(choice.rank, choice.expert_rank)
        return tucker_of_experts(self._weights[name], ranks)


@pytest.fixture(params=EXPERT_FAMILIES)
def experts(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_tiny_model(request.param)


def point_of(own: LoadedModel, **choice: object) -> DesignPoint:
    return DesignPoint.from_json({"method": "tucker", **choice}, own.topology)


def reconstructed(own: LoadedModel, point: DesignPoint, source: OwnFactors) -> hf.PreTrainedModel:
    """A dense copy of the model with the products of the factors as weights."""
    model = copy.deepcopy(own.model)
    for name, choice in point:
        tensor = own.topology.experts_by_name[name]
        model.get_submodule(tensor.module).get_parameter(tensor.parameter).data = source.expert_factors(
            name, choice
        ).product()
    return model


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_logits_equal_those_of_the_reconstructed_weights(experts: LoadedModel, name: str, implementation: str) -> None:
    experts.model.set_experts_implementation(implementation)
    source, point = OwnFactors(experts), point_of(experts, **POINTS[name])
    dense = reconstructed(experts, point, source)
    with torch.inference_mode():
        expected, expected_one = dense(TOKENS).logits, dense(TOKENS[:1, :1]).logits
        with decompose(experts, point, source):
            logits, one = experts.model(TOKENS).logits, experts.model(TOKENS[:1, :1]).logits
        original = experts.model(TOKENS).logits
    assert largest_difference(logits, expected) < 1e-5
    assert largest_difference(one, expected_one) < 1e-5  # a single token uses a separate code path
    assert largest_difference(original, expected) > 1e-3  # the point is far from dense


def test_generation_equals_that_of_the_reconstructed_weights(experts: LoadedModel) -> None:
    source, point = OwnFactors(experts), point_of(experts, rank=6, roles=EXPERT_ROLES)
    dense = reconstructed(experts, point, source)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    expected = dense.generate(TOKENS, **settings)
    with decompose(experts, point, source):
        assert torch.equal(experts.model.generate(TOKENS, **settings), expected)


def test_undoing_restores_the_same_module_objects(experts: LoadedModel) -> None:
    before = {path: module for path, module in experts.model.named_modules() if path.endswith("experts")}
    weights = {name: (id(p), p.data_ptr(), p.clone()) for name, p in experts.model.named_parameters()}
    handle = apply_point(
        experts.model, experts.topology, point_of(experts, rank=3, roles=["expert_down"]), OwnFactors(experts)
    )
    inside = experts.model.model.layers[1].mlp.experts
    assert isinstance(inside, TuckerExperts)
    assert handle.is_applied
    assert (
        inside.gate_up.core is before["model.layers.1.mlp.experts"].gate_up_proj
    )  # a tensor that stays dense is not copied
    handle.use_baseline()
    handle.use_candidate()
    handle.undo()
    assert before == {path: m for path, m in experts.model.named_modules() if path.endswith("experts")}
    after = dict(experts.model.named_parameters())
    assert list(after) == list(weights)
    assert all(
        id(after[n]) == i and after[n].data_ptr() == p and torch.equal(after[n], w) for n, (i, p, w) in weights.items()
    )


@pytest.mark.parametrize("name", POINTS)
def test_cost_equals_the_parameters_and_flops_of_the_module(experts: LoadedModel, name: str) -> None:
    point = point_of(experts, **POINTS[name])
    held = sum(p.numel() for p in experts.model.parameters())
    assert point_cost(experts.topology, DesignPoint.dense()).parameters == held
    with decompose(experts, point, OwnFactors(experts)):
        assert point_cost(experts.topology, point).parameters == sum(p.numel() for p in experts.model.parameters())
        for tokens in (1, 12):
            flops = _flops_of_experts(experts, tokens)
            expected = sum(_entries(experts, tensor.name, point) for tensor in experts.topology.experts)
            assert flops == 2 * tokens * expected
    dense, here = point_cost(experts.topology, DesignPoint.dense()), point_cost(experts.topology, point)
    assert dense.flops_decode_per_token is not None
    assert here.flops_decode_per_token is not None
    saved = sum(t.matmul_parameters - _entries(experts, t.name, point) for t in experts.topology.experts)
    assert dense.flops_decode_per_token - here.flops_decode_per_token == 2 * saved
    assert here.weight_bytes == 4 * here.parameters


def _entries(own: LoadedModel, name: str, point: DesignPoint) -> int:
    tensor, choice = own.topology.experts_by_name[name], point.by_name.get(name)
    return (
        tensor.matmul_parameters if choice is None else tensor.factor_matmul_parameters(choice.rank, choice.expert_rank)
    )


def _flops_of_experts(own: LoadedModel, tokens: int) -> int:
    """FLOPs of the experts' modules, by torch's counter."""
    own.model.set_experts_implementation("eager")
    total = 0
    for layer in own.model.model.layers:
        module, chosen = layer.mlp.experts, own.topology.experts[0].experts_per_token
        index = torch.stack([torch.randperm(own.topology.experts[0].experts)[:chosen] for _ in range(tokens)])
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            module(torch.randn(tokens, 32), index, torch.rand(tokens, chosen))
        total += counter.get_total_flops()
    return total


def test_unused_experts_and_empty_batches() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 10, 6)
    factors = tucker_of_experts(weight, (4, 6, 5))
    read = TuckerExpertWeight(factors.core, factors.experts, factors.left, factors.right)
    expected = factors.product()
    tokens, chosen = torch.randn(7, 6), torch.full((7, 1), 2)
    assert torch.allclose(read.read(tokens, chosen)[:, 0], tokens @ expected[2].T, atol=1e-5)
    assert read.read(tokens[:0], chosen[:0]).shape == (0, 1, 10)
    assert read.write(torch.randn(0, 1, 6), chosen[:0], torch.rand(0, 1)).shape == (0, 10)


def test_half_precision_keeps_the_dtype() -> None:
    own = loaded_tiny_model("mixtral", dtype=torch.bfloat16)
    point = point_of(own, rank=6, expert_rank=2, roles=EXPERT_ROLES)
    with decompose(own, point, OwnFactors(own)), torch.inference_mode():
        logits = own.model(TOKENS).logits
        assert {p.dtype for p in own.model.parameters()} == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits).all())


def test_a_block_and_its_experts_cannot_be_in_one_point(experts: LoadedModel) -> None:
    point = DesignPoint.of({"layers.0.mlp": TensorChoice.removal(), "layers.0.expert_down": TensorChoice("tucker", 2)})
    with pytest.raises(PointError, match=r"'layers\.0\.expert_down' is part of both"):
        apply_point(experts.model, experts.topology, point, OwnFactors(experts))


def test_removed_blocks_and_decomposed_experts_in_one_point(experts: LoadedModel) -> None:
    point = DesignPoint.of({"layers.0.mlp": TensorChoice.removal(), "layers.1.expert_down": TensorChoice("tucker", 2)})
    with decompose(experts, point, OwnFactors(experts)):
        assert point_cost(experts.topology, point).parameters == sum(p.numel() for p in experts.model.parameters())


@pytest.mark.parametrize("method", ["svd", "whitened_svd", "tucker_merged", "fisher_svd"])
def test_other_methods_are_refused(experts: LoadedModel, method: str) -> None:
    point = DesignPoint.of({"layers.1.expert_down": TensorChoice(method, 2)})
    with pytest.raises(
        PointError, match=rf"must be decomposed by method 'tucker', but 'layers\.1\.expert_down'.*'{method}'"
    ):
        apply_point(experts.model, experts.topology, point, OwnFactors(experts))


def test_ranks_outside_their_limits_are_refused(experts: LoadedModel) -> None:
    tensor = experts.topology.experts[0]
    limit = tensor.break_even_rank()
    with pytest.raises(RankError, match=rf"`rank <= {limit}` must hold for '{tensor.name}' \(break-even of "):
        apply_point(
            experts.model,
            experts.topology,
            DesignPoint.of({tensor.name: TensorChoice("tucker", limit + 1)}),
            OwnFactors(experts),
        )
    too_many = DesignPoint.of({tensor.name: TensorChoice("tucker", 2, tensor.experts)})
    with pytest.raises(RankError, match=rf"`expert_rank < {tensor.experts}` must hold"):
        point_cost(experts.topology, too_many)
    matrix = DesignPoint.of({"layers.0.query": TensorChoice("tucker", 2, 1)})
    with pytest.raises(PointError, match=r"'layers\.0\.query' is a matrix"):
        point_cost(experts.topology, matrix)


def test_decomposed_experts_are_not_decomposed_again(experts: LoadedModel) -> None:
    source = OwnFactors(experts)
    with decompose(experts, point_of(experts, rank=2, roles=["expert_down"]), source):
        with pytest.raises(PointError, match=r"'layers\.0\.expert_gate_up' must be dense.*undo first"):
            apply_point(
                experts.model, experts.topology, point_of(experts, rank=2, roles=["expert_gate_up"], layers=[0]), source
            )
        with pytest.raises(ModelError, match=r"'layers\.0\.expert_gate_up' is not dense"):
            _ = experts.fingerprint


def test_the_bank_stores_each_choice_of_ranks(experts: LoadedModel, tmp_path: Path) -> None:
    point = point_of(experts, rank=5, expert_rank=2, roles=EXPERT_ROLES)
    bank = FactorBank.build(experts, [point], folder=tmp_path)
    source = OwnFactors(experts)
    for name, choice in (*point, ("layers.0.expert_down", TensorChoice("tucker", 3))):
        given, expected = bank.expert_factors(name, choice), source.expert_factors(name, choice)
        assert given.ranks == expected.ranks
        assert torch.allclose(given.product(), expected.product(), atol=1e-5)
    # Another bank reads them from disk, even while the model is decomposed.
    again = FactorBank.build(experts, [point], folder=tmp_path)
    with decompose(experts, point, again):
        found = again.expert_factors("layers.0.expert_down", TensorChoice("tucker", 3))
        assert torch.equal(found.core, bank.expert_factors("layers.0.expert_down", TensorChoice("tucker", 3)).core)
        with pytest.raises(PointError, match="must be dense before"):
            again.expert_factors("layers.0.expert_down", TensorChoice("tucker", 4))
    assert again.identity(point) == bank.identity(point) != ""


def test_the_bank_rebuilds_damaged_expert_factors(
    experts: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    point = point_of(experts, rank=3, roles=["expert_down"], layers=[0])
    bank = FactorBank.build(experts, [point], folder=tmp_path)
    (name, choice), *_ = point
    core = bank.expert_factors(name, choice).core
    (file,) = tmp_path.glob("tucker-*/layers.0.expert_down@*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = FactorBank.build(experts, [point], folder=tmp_path)
    assert torch.equal(again.expert_factors(name, choice).core, core)
    assert "is damaged" in caplog.text
    assert bytes(content) != file.read_bytes()


def test_the_bank_refuses_experts_in_a_point_that_refits(experts: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.of(
        {"layers.0.query": TensorChoice("fisher_svd_refit", 2), "layers.0.expert_down": TensorChoice("tucker", 2)}
    )
    bank = FactorBank.build(
        experts, [DesignPoint.of({"layers.0.expert_down": TensorChoice("tucker", 2)})], folder=tmp_path
    )
    with pytest.raises(PointError, match=r"without a refit, but 'layers\.0\.expert_down' goes with 'fisher_svd_refit'"):
        bank.of_point(point)


def test_matrices_and_experts_in_one_point(experts: LoadedModel, tmp_path: Path) -> None:
    choices = {"layers.0.query": TensorChoice("svd", 2), "layers.0.expert_down": TensorChoice("tucker", 2)}
    point = DesignPoint.of({**choices, "layers.1.key": TensorChoice("tucker", 2)})
    bank = FactorBank.build(experts, [point], folder=tmp_path)
    with decompose(experts, point, bank), torch.inference_mode():
        assert point_cost(experts.topology, point).parameters == sum(p.numel() for p in experts.model.parameters())
        assert bool(torch.isfinite(experts.model(TOKENS).logits).all())


def test_sources_without_experts_are_refused(experts: LoadedModel) -> None:
    with pytest.raises(PointError, match="must hold those of fused expert tensors, but object has none"):
        apply_point(experts.model, experts.topology, point_of(experts, rank=2, roles=EXPERT_ROLES), object())  # type: ignore[arg-type]
