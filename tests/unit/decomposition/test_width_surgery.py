"""MLPs of reduced width in every family: parameters, FLOPs, outputs, and undoing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decomposition_support import windows_of
from tiny_models import as_loaded, loaded_tiny_model, tiny_model, with_random_vectors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dse.cost import check_point, point_cost
from dse.decomposition import FactorBank, decompose
from dse.decomposition.factors import as_matrix
from dse.decomposition.width_surgery import kept_rows
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError, RankError
from dse.models import LoadedModel

WIDTH_FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi", "phi3", "cohere", "gpt_neox", "gpt2", "opt", "bloom",
    "bert", "roberta", "distilbert",
)  # fmt: skip
WITHOUT_WIDTH = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
TOKENS = torch.arange(3, 27).reshape(2, 12)
WINDOWS = windows_of(torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(1)))


def tiny(family: str) -> LoadedModel:
    return as_loaded(with_random_vectors(tiny_model(family, initializer_range=0.2)))


def outputs_of(model: nn.Module) -> torch.Tensor:
    found = model(TOKENS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("family", WIDTH_FAMILIES)
def test_a_model_of_reduced_width(family: str, tmp_path: Path) -> None:
    """Its parameters and FLOPs are those of the cost model, its outputs those of the dense modules with zeroed columns,
    and undoing restores the weights."""
    loaded = tiny(family)
    topology, model = loaded.topology, loaded.model
    assert [mlp.name for mlp in topology.mlps] == [f"layers.{layer}.mlp" for layer in range(topology.layer_count)]
    widths = {mlp.name: mlp.channels // (2 + layer) + 1 for layer, mlp in enumerate(topology.mlps[1:])}
    point = DesignPoint.of({name: TensorChoice("width", width) for name, width in widths.items()})
    bank = FactorBank.build(loaded, [point], WINDOWS, folder=tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = outputs_of(model)
    with decompose(loaded, point, bank):
        narrow = outputs_of(model)
        parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        matrices = {t.name: model.get_submodule(t.module).weight.shape for m in topology.mlps for t in m.tensors}
    assert parameters == point_cost(topology, point).parameters
    for name, width in widths.items():
        mlp = topology.mlps_by_name[name]
        for tensor in mlp.inputs:
            assert matrices[tensor.name] == (width * tensor.out_features // mlp.channels, tensor.in_features)
        assert matrices[mlp.output.name] == (mlp.output.out_features, width)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.allclose(narrow, dense, atol=1e-3)
    # The same outputs with the dense modules: the refitted matrix, with zero columns for the channels that are dropped.
    for name, width in widths.items():
        mlp, factors = topology.mlps_by_name[name], bank.channels(name)
        matrix = torch.zeros(mlp.output.shape)
        matrix[:, factors.kept(width)] = factors.output_matrix(width)
        weight = model.get_submodule(mlp.output.module).weight
        weight.copy_(matrix.T if mlp.output.kind == "conv1d" else matrix)
    torch.testing.assert_close(outputs_of(model), narrow, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", WITHOUT_WIDTH)
def test_models_without_independent_channels_are_refused(family: str) -> None:
    topology = tiny(family).topology
    assert not topology.mlps
    with pytest.raises(PointError, match=r"method 'width'|must be|only attention"):
        check_point(topology, DesignPoint.of({"layers.0.mlp": TensorChoice("width", 8)}))


class MixedChannels(nn.Module):
    """An MLP that normalises over its channels, so that each depends on all."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        self.norm = nn.LayerNorm(dense.down_proj.in_features)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.norm(self.gate_proj(hidden).relu() * self.up_proj(hidden)))


class Interleaved(MixedChannels):
    """An MLP that multiplies neighbouring channels."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(hidden).relu() * self.up_proj(hidden).roll(1, -1))


@pytest.mark.parametrize("mixed", [MixedChannels, Interleaved])
def test_channels_that_depend_on_each_other_are_detected(mixed: type[nn.Module]) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = mixed(model.model.layers[1].mlp)
    topology = as_loaded(model).topology
    assert [mlp.name for mlp in topology.mlps] == ["layers.0.mlp", "layers.2.mlp"]
    assert topology["layers.1.down"].in_features == 48  # still decomposable
    with pytest.raises(PointError, match=r"'layers\.1\.mlp' is none of this model's 2 MLPs with independent channels"):
        check_point(topology, DesignPoint.of({"layers.1.mlp": TensorChoice("width", 8)}))


def test_flops_are_those_of_the_smaller_matrices(tmp_path: Path) -> None:
    loaded = tiny("llama")
    point = DesignPoint.uniform(loaded.topology, "width", 20)
    bank = FactorBank.build(loaded, [point], WINDOWS, folder=tmp_path)
    counted = {}
    for name, chosen in (("dense", DesignPoint.dense()), ("narrow", point)):
        with decompose(loaded, chosen, bank), FlopCounterMode(display=False) as counter:
            loaded.model(TOKENS)
        counted[name] = counter.get_total_flops() / TOKENS.numel()
    saved = [point_cost(loaded.topology, p).flops_prefill_per_token for p in (DesignPoint.dense(), point)]
    assert counted["dense"] - counted["narrow"] == saved[0] - saved[1] == 2 * 3 * (48 - 20) * 3 * 32


def test_a_wrong_width_names_the_rule() -> None:
    topology = loaded_tiny_model("llama").topology
    with pytest.raises(RankError, match=r"`rank < 48` must hold for the width of 'layers\.0\.mlp', which has 48"):
        check_point(topology, DesignPoint.of({"layers.0.mlp": TensorChoice("width", 48)}))
    with pytest.raises(PointError, match=r"'layers\.0\.up' is none of this model's 3 MLPs"):
        check_point(topology, DesignPoint.of({"layers.0.up": TensorChoice("width", 8)}))
    both = {"layers.0.mlp": TensorChoice("width", 8), "layers.0.up": TensorChoice("svd", 4)}
    with pytest.raises(PointError, match=r"a point must name a tensor once, but 'layers\.0\.up'"):
        check_point(topology, DesignPoint.of(both))


def test_the_channels_are_read_from_disk(tmp_path: Path) -> None:
    loaded = tiny("llama")
    point = DesignPoint.uniform(loaded.topology, "width", 20)
    first = FactorBank.build(loaded, [point], WINDOWS, folder=tmp_path)
    again = FactorBank.build(loaded, [point], WINDOWS, folder=tmp_path, progress=_refuse_work)
    for name, _ in point:
        for mine, other in zip(vars(first.channels(name)).values(), vars(again.channels(name)).values(), strict=True):
            assert torch.equal(mine, other)
    with pytest.raises(PointError, match="must hold the channels"):
        FactorBank.build(loaded, [DesignPoint.dense()], WINDOWS, folder=tmp_path).channels("layers.0.mlp")


def _refuse_work(phase: str, _done: int, _total: int) -> None:
    raise AssertionError(f"{phase} must not run again")


def test_rows_of_a_fused_matrix() -> None:
    kept = torch.tensor([0, 3, 4])
    assert kept_rows(kept, 5, 5).tolist() == [0, 3, 4]
    assert kept_rows(kept, 5, 10).tolist() == [0, 3, 4, 5, 8, 9]


def test_a_refit_sees_the_narrow_mlps(tmp_path: Path) -> None:
    """The factors behind an MLP of reduced width are refitted to what it returns, as if it were the model's own."""
    loaded = tiny("llama")
    width = DesignPoint.of({"layers.0.mlp": TensorChoice("width", 16)})
    behind = {"layers.2.query": TensorChoice("fisher_svd_refit", 8)}
    point = DesignPoint((*width.choices, *behind.items()))
    bank = FactorBank.build(loaded, [point, width], WINDOWS, folder=tmp_path)
    together = bank.of_point(point).factors("layers.2.query", behind["layers.2.query"])
    alone = bank.of_point(DesignPoint.of(behind)).factors("layers.2.query", behind["layers.2.query"])
    assert torch.equal(together.right, alone.right)
    assert not torch.allclose(together.left, alone.left, atol=1e-4)
    weight = as_matrix(loaded.model.get_submodule("model.layers.2.self_attn.q_proj"))
    seen: list[torch.Tensor] = []
    with decompose(loaded, point, bank) as applied:
        loaded.model.get_submodule("model.layers.2.self_attn.q_proj").register_forward_pre_hook(
            lambda _module, arguments: seen.append(arguments[0].reshape(-1, 32))
        )
        loaded.model(WINDOWS.token_ids)
        applied.use_baseline()
        loaded.model.get_submodule("model.layers.2.self_attn.q_proj").register_forward_pre_hook(
            lambda _module, arguments: seen.append(arguments[0].reshape(-1, 32))
        )
        loaded.model(WINDOWS.token_ids)
    narrow, dense = seen
    target = dense @ weight.T

    def error(left: torch.Tensor) -> float:
        return float((target - narrow @ together.right.T @ left.T).square().sum())

    assert error(together.left) < error(bank.factors("layers.2.query", behind["layers.2.query"]).left)
