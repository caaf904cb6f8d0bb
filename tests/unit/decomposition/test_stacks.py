"""Stacks: several tensors of a layer decomposed as one matrix, with one right factor and one shared product."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import loaded_tiny_model, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dse.cost import break_even_rank, check_point, has_core, point_cost
from dse.decomposition import FactorBank, LowRankFactors, StackedLinear, apply_point, calibration_windows, decompose
from dse.decomposition.activation_grams import iterate_grams
from dse.decomposition.factors import applied_factors, factors_of
from dse.decomposition.low_rank_modules import NormThenFactor, SharedProduct
from dse.decomposition.methods import METHODS, factorise
from dse.decomposition.surgery import stacked_modules
from dse.design_point import METHOD_NAMES, DesignPoint, TensorChoice
from dse.errors import PointError, RankError
from dse.model_parts import TensorStack
from dse.models import LoadedModel, topology_of

TOKENS = torch.arange(12).reshape(2, 6)


def windows(llama: LoadedModel):  # type: ignore[no-untyped-def]
    from dse.config import CalibrationConfig

    return calibration_windows(llama.tokenizer, CalibrationConfig(tokens=256, window=32), longest_window=64)


def stacked_weight(loaded: LoadedModel, stack: TensorStack) -> torch.Tensor:
    return torch.cat([loaded.model.get_submodule(path).weight for path in stack.modules])


def stack_point(loaded: LoadedModel, method: str = "svd", rank: int = 5) -> DesignPoint:
    return DesignPoint.of({stack.name: TensorChoice(method, rank) for stack in loaded.topology.stacks})


def test_a_stack_is_the_matrix_of_its_members(llama: LoadedModel) -> None:
    stack = llama.topology.stacks_by_name["layers.1.query_key_value"]
    assert [member.name for member in stack.members] == [f"layers.1.{role}" for role in ("query", "key", "value")]
    assert stack.shape == (32 + 16 + 16, 32)
    assert stack.parameters == sum(llama.topology[f"layers.1.{role}"].parameters for role in ("query", "key", "value"))
    assert stack.rows == (slice(0, 32), slice(32, 48), slice(48, 64))
    assert llama.topology.tensors_of(stack.name) == ("layers.1.query", "layers.1.key", "layers.1.value")
    names = [matrix.name for matrix in llama.topology.matrices if matrix.layer == 1]
    assert names[:2] == ["layers.1.query_key_value", "layers.1.query"]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_bank_decomposes_the_stacked_matrix(llama: LoadedModel, method: str, tmp_path: Path) -> None:
    """The bank applies the method to the stacked weight, with the Gram matrix of the shared input."""
    text = windows(llama)
    stack = llama.topology.stacks_by_name["layers.1.gate_up"]
    bank = FactorBank.build(llama, {method: {stack.name: 7}}, text, folder=tmp_path)
    found = bank.factors(stack.name, TensorChoice(method, 7))
    assert (found.left.shape, found.right.shape) == ((96, 7), (7, 32))
    if METHODS[method].needs_gradients:
        return  # the gradients are compared in the next test
    ((sharing, gram),) = iterate_grams(llama.model, llama.topology, ("layers.1.gate",), text)
    assert sharing == ("layers.1.gate",)
    expected = factorise(stacked_weight(llama, stack), method, 7, gram)
    torch.testing.assert_close(found.product(), expected.product(), atol=1e-5, rtol=1e-4)


def test_gradients_of_a_stack_are_those_of_its_concatenated_outputs(llama: LoadedModel) -> None:
    from dse.decomposition.gradient_grams import GradientGrams

    text = windows(llama)
    stack = llama.topology.stacks_by_name["layers.1.gate_up"]
    whole = GradientGrams(llama.model, llama.topology, (stack.name,), text).take(stack.name)
    parts = GradientGrams(llama.model, llama.topology, ("layers.1.gate", "layers.1.up"), text)
    torch.testing.assert_close(whole[:48, :48], parts.take("layers.1.gate"))
    torch.testing.assert_close(whole[48:, 48:], parts.take("layers.1.up"))
    assert float(whole[:48, 48:].abs().max()) > 0
    assert float(torch.linalg.eigvalsh(whole.double()).min()) > -1e-9 * float(whole.trace())


def test_a_stack_and_its_members_share_one_gram_matrix(llama: LoadedModel) -> None:
    names = ("layers.0.query_key_value", "layers.0.query", "layers.0.value")
    ((sharing, _),) = iterate_grams(llama.model, llama.topology, names, windows(llama))
    assert set(sharing) == set(names)


@pytest.mark.parametrize("method", ["svd", "tucker", "whitened_svd"])
def test_the_model_equals_one_with_the_stacked_product_as_weights(
    llama: LoadedModel, method: str, tmp_path: Path
) -> None:
    point = stack_point(llama, method)
    bank = FactorBank.build(llama, [point], windows(llama), folder=tmp_path)
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    dense = llama.model(TOKENS).logits
    expected = copy.deepcopy(llama.model)
    for name, choice in point:
        stack = llama.topology.stacks_by_name[name]
        product = bank.factors(name, choice).product()
        for path, rows in zip(stack.modules, stack.rows, strict=True):
            expected.get_submodule(path).weight.data.copy_(product[rows])
    with decompose(llama, point, bank):
        torch.testing.assert_close(llama.model(TOKENS).logits, expected(TOKENS).logits, atol=1e-5, rtol=1e-4)
        assert sum(p.numel() for p in llama.model.parameters()) == point_cost(llama.topology, point).parameters
        assert len({id(p) for p in llama.model.state_dict(keep_vars=True).values()}) == len(llama.model.state_dict())
    after = llama.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(llama.model(TOKENS).logits, dense)


def test_the_right_factor_follows_the_norm_that_only_the_members_read(llama: LoadedModel, tmp_path: Path) -> None:
    point = stack_point(llama, "tucker")
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    norm = llama.model.model.layers[1].input_layernorm
    with decompose(llama, point, bank):
        layer = llama.model.model.layers[1]
        assert isinstance(layer.input_layernorm, NormThenFactor)
        assert layer.input_layernorm.norm is norm
        assert type(layer.self_attn.q_proj) is nn.Linear
        assert layer.self_attn.q_proj.weight.shape == (32, 5)
        name = "layers.1.query_key_value"
        found = applied_factors(llama.model, llama.topology, name)
        whole = bank.factors(name, TensorChoice("tucker", 5)).product()
        torch.testing.assert_close(torch.cat([factors.product() for factors in found.values()]), whole)
    assert llama.model.model.layers[1].input_layernorm is norm


@pytest.mark.parametrize("family", ["phi", "cohere", "olmo2"])
def test_members_share_the_product_where_other_modules_read_the_norm(family: str, tmp_path: Path) -> None:
    """Attention and MLP of Phi and Cohere read the same norm; OLMo 2 has no norm before its blocks."""
    loaded = loaded_tiny_model(family)
    stack = loaded.topology.stacks_by_name["layers.1.query_key_value"]
    assert stack.norm == ""
    point = DesignPoint.of({stack.name: TensorChoice("svd", 5)})
    bank = FactorBank.build(loaded, [point], folder=tmp_path)
    with decompose(loaded, point, bank):
        assert {type(loaded.model.get_submodule(path)) for path in stack.modules} == {StackedLinear}
        found = applied_factors(loaded.model, loaded.topology, stack.name)
    assert len({factors.right.data_ptr() for factors in found.values()}) == 1


@pytest.mark.parametrize("core", [False, True])
def test_a_stack_at_full_rank_equals_the_dense_layers(core: bool) -> None:
    torch.manual_seed(0)
    members = [nn.Linear(16, size, bias=size != 8) for size in (24, 8, 8)]
    weight = torch.cat([member.weight.data for member in members])
    factors = factorise(weight, "tucker" if core else "svd", 16)
    rows = (slice(0, 24), slice(24, 32), slice(32, 40))
    modules = stacked_modules(factors, rows, [member.bias for member in members])
    x = torch.randn(3, 5, 16)
    for module, member in zip(modules, members, strict=True):
        torch.testing.assert_close(module(x), member(x), atol=1e-5, rtol=1e-4)
        assert module.bias is member.bias


class Counted(SharedProduct):
    """A `SharedProduct` that counts its products."""

    products = 0

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        type(self).products += 1
        return super()._product(x)


def counted(members: int = 3) -> tuple[tuple[StackedLinear, ...], SharedProduct]:
    torch.manual_seed(0)
    Counted.products = 0
    shared = Counted(torch.randn(2, 4), None, members)
    return tuple(StackedLinear(torch.randn(3, 2), None, shared, i) for i in range(members)), shared


def alone(module: StackedLinear, x: torch.Tensor) -> torch.Tensor:
    return x @ factors_of(module).product().T


@pytest.mark.parametrize("inference", [False, True])
def test_the_shared_product_is_computed_once_and_released(inference: bool) -> None:
    modules, shared = counted()
    with torch.inference_mode(inference):
        for _ in range(2):  # the same input again, in a second pass
            x = torch.randn(2, 4)
            Counted.products = 0
            for module in modules:
                torch.testing.assert_close(module(x), alone(module, x))
            assert Counted.products == 1
            assert shared._held is None
        for module in modules:
            torch.testing.assert_close(module(x), alone(module, x))
        assert Counted.products == 2


def test_a_product_is_never_reused_for_another_input() -> None:
    modules, shared = counted()
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    for module, x in zip(modules, (first, second, first), strict=True):
        torch.testing.assert_close(module(x), alone(module, x))
    x = torch.randn(2, 4)
    modules[0](x)
    x.add_(1)  # in place, between two members
    torch.testing.assert_close(modules[1](x), alone(modules[1], x))
    with torch.inference_mode():
        x = torch.randn(2, 4)
        modules[0](x)
        x.add_(1)  # in place and uncounted in inference mode: a member that calls again gets a new product
        torch.testing.assert_close(modules[0](x), alone(modules[0], x))
    copied = copy.deepcopy(nn.ModuleList(modules))
    assert copied[2].shared is copied[0].shared is not shared
    assert copied[0].shared._held is None


def test_an_error_between_members_has_no_lasting_effect(llama: LoadedModel, tmp_path: Path) -> None:
    point = stack_point(llama)
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    with decompose(llama, point, bank):
        expected = llama.model(TOKENS).logits
        key = llama.model.get_submodule(llama.topology["layers.1.key"].module)
        handle = key.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            llama.model(TOKENS + 1)
        handle.remove()
        assert torch.equal(llama.model(TOKENS).logits, expected)


def test_stacks_survive_swaps_copies_dtype_changes_and_forks(llama: LoadedModel, tmp_path: Path) -> None:
    point = stack_point(llama)
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    dense = llama.model(TOKENS).logits
    handle = apply_point(llama.model, llama.topology, point, bank)
    thin = llama.model(TOKENS).logits
    for _ in range(2):
        handle.use_baseline()
        assert torch.equal(llama.model(TOKENS).logits, dense)
        handle.use_candidate()
        assert torch.equal(llama.model(TOKENS).logits, thin)
    copied = copy.deepcopy(llama.model)
    assert torch.equal(copied(TOKENS).logits, thin)
    assert copied.to(torch.bfloat16)(TOKENS).logits.dtype == torch.bfloat16
    assert torch.equal(llama.model(TOKENS).logits, thin)
    torch.testing.assert_close(copied.float()(TOKENS).logits, thin, atol=0.05, rtol=0.05)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        same = torch.equal(llama.model(TOKENS).logits, thin)
        os.write(write, b"1" if same else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    with pytest.raises(PointError, match="decomposed already"):
        apply_point(llama.model, llama.topology, DesignPoint.uniform(llama.topology, "svd", 2, [0], ["key"]), bank)
    with pytest.raises(PointError, match="must be dense while a factor bank is built"):
        FactorBank.build(llama, {"svd": {"layers.0.key": 2}}, folder=tmp_path / "again")
    handle.undo()


def test_generation_with_a_cache_equals_generation_without(llama: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.of(dict(stack_point(llama)) | {"layers.0.attention_output": TensorChoice("svd", 4)})
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    rules = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with decompose(llama, point, bank), torch.inference_mode():
        assert torch.equal(
            llama.model.generate(TOKENS, **rules), llama.model.generate(TOKENS, use_cache=False, **rules)
        )


def test_cost_counts_the_shared_factor_once(llama: LoadedModel, tmp_path: Path) -> None:
    point = stack_point(llama, rank=6)
    found, dense = point_cost(llama.topology, point), point_cost(llama.topology, DesignPoint.dense())
    saved = 3 * ((64 * 32 - 6 * (64 + 32)) + (96 * 32 - 6 * (96 + 32)))
    assert dense.parameters - found.parameters == saved
    assert dense.flops_decode_per_token - found.flops_decode_per_token == 2 * saved
    bank = FactorBank.build(llama, [point], folder=tmp_path)
    counts = []
    for applied in (False, True):
        with (
            decompose(llama, point if applied else DesignPoint.dense(), bank),
            FlopCounterMode(display=False) as counter,
        ):
            llama.model(TOKENS)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * saved * TOKENS.numel()
    for core in (False, True):
        limit = break_even_rank(64, 32, core=core)
        method = "tucker" if core else "svd"
        assert has_core(method) is core
        name = "layers.0.query_key_value"
        check_point(llama.topology, DesignPoint.of({name: TensorChoice(method, limit)}))
        with pytest.raises(RankError, match=r"break-even of 64 x 32"):
            check_point(llama.topology, DesignPoint.of({name: TensorChoice(method, limit + 1)}))


def test_overlapping_choices_are_refused(llama: LoadedModel) -> None:
    stack = {"layers.1.query_key_value": TensorChoice("svd", 2)}
    with pytest.raises(PointError, match=r"'layers.1.key' is part of both"):
        check_point(llama.topology, DesignPoint.of(stack | {"layers.1.key": TensorChoice("svd", 2)}))
    with pytest.raises(PointError, match=r"part of both 'layers.1.attention' and 'layers.1.query_key_value'"):
        check_point(llama.topology, DesignPoint.of(stack | {"layers.1.attention": TensorChoice.removal()}))
    check_point(llama.topology, DesignPoint.of(stack | {"layers.1.mlp": TensorChoice.removal()}))


def test_points_with_stacks_round_trip_through_json(llama: LoadedModel) -> None:
    topology = llama.topology
    point = DesignPoint.uniform(topology, "svd", 3, [0, 2], ["query_key_value", "down"])
    assert set(point.by_name) == {f"layers.{i}.{role}" for i in (0, 2) for role in ("query_key_value", "down")}
    assert DesignPoint.read(point.canonical_json, topology) == point
    assert DesignPoint.from_json(point.compact(topology) or {}, topology) == point
    everything = DesignPoint.uniform(topology, "svd", 3)
    assert not any(name in topology.stacks_by_name for name, _ in everything)


def test_the_compiled_graph_holds_the_shared_product_once() -> None:
    """It is traced without a graph break."""
    from torch._dynamo.backends.common import aot_autograd

    modules, _ = counted()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        return [module(x) for module in modules]

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        x = torch.randn(2, 4)
        for found, module in zip(compiled(x), modules, strict=True):
            torch.testing.assert_close(found, alone(module, x))
    products = [node for node in graphs[0].graph.nodes if "mm" in str(node.target)]
    assert len(products) == 1 + len(modules)
    torch._dynamo.reset()


class SeparateInputs(nn.Module):
    """An MLP whose gate and up projection read different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x + 0) * self.up_proj(x))


def test_members_must_read_the_same_tensor_object(llama: LoadedModel) -> None:
    llama.model.model.layers[1].mlp = SeparateInputs()
    topology = topology_of(llama.model)
    assert "layers.1.gate" in topology.by_name
    assert "layers.1.gate_up" not in topology.stacks_by_name
    assert "layers.0.gate_up" in topology.stacks_by_name
    fused = topology_of(tiny_model("phi3"))
    assert fused.stacks == ()
    assert {"query_key_value", "gate_up"} <= set(fused.roles)


def test_shapes_of_a_stack_must_chain() -> None:
    with pytest.raises(ValueError, match="must chain"):
        StackedLinear(torch.ones(3, 3), None, SharedProduct(torch.ones(2, 4), None, 2), 0)
    factors = LowRankFactors(torch.ones(5, 2), torch.ones(2, 4))
    modules = stacked_modules(factors, (slice(0, 3), slice(3, 5)), (None, None))
    assert [(m.out_features, m.in_features, m.rank) for m in modules] == [(3, 4, 2), (2, 4, 2)]
    assert "members=2" in repr(modules[0])
