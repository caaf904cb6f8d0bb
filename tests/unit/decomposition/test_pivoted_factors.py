"""Pivoted factors: the same matrix in fewer numbers, with small combinations, and the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decomposition_support import windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import loaded_tiny_model

from dse.cost import check_point, point_cost
from dse.decomposition import FactorBank, LowRankFactors, decompose
from dse.decomposition.factors import factors_of
from dse.decomposition.low_rank_modules import LowRankLinear
from dse.decomposition.pivoted_factors import pivoted
from dse.decomposition.pivoted_module import PivotedLinear
from dse.design_point import PIVOTED, DesignPoint, TensorChoice
from dse.errors import PointError, RankError
from dse.sensitivity.allocation_curves import allocate_curves


def factors(m: int, n: int, rank: int, seed: int = 0, *, core: bool = False) -> LowRankFactors:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return LowRankFactors(left, right, torch.randn(rank, rank, generator=generator) if core else None)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.data(), st.booleans(), st.booleans())
def test_the_matrix_is_the_same_in_fewer_numbers(
    m: int, n: int, data: st.DataObject, core: bool, of_columns: bool
) -> None:
    rank = data.draw(st.integers(1, min(m, n) - 1))
    plain = factors(m, n, rank, data.draw(st.integers(0, 99)), core=core)
    found = pivoted(plain, of_columns=of_columns)
    torch.testing.assert_close(found.product(), plain.product(), rtol=1e-3, atol=1e-3)
    assert found.pivots.numel() + found.combinations.numel() == rank * (m + n) - rank**2
    assert sorted(found.columns_or_rows.tolist()) == list(range(n if of_columns else m))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("of_columns", [False, True])
def test_the_module_computes_what_two_factors_compute(
    shape: tuple[int, int], with_bias: bool, of_columns: bool
) -> None:
    plain = factors(*shape, 10)
    bias = torch.randn(shape[0]) if with_bias else None
    found = pivoted(plain, of_columns=of_columns)
    module = PivotedLinear(found.pivots, found.combinations, found.chosen, of_columns=found.of_columns, bias=bias)
    x = torch.randn(2, 5, shape[1])
    expected = LowRankLinear(plain.left, plain.right, bias)(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factors_of(module).product(), plain.product(), rtol=1e-4, atol=1e-4)
    assert "order" not in module.state_dict()
    assert (module.bias is None) == (bias is None)
    parameters = sum(p.numel() for p in module.parameters())
    assert parameters == 10 * (sum(shape) - 10) + (shape[0] if with_bias else 0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_order_survives_construction_on_the_meta_device(shape: tuple[int, int]) -> None:
    """Loaders construct a model without memory, fill its parameters, and replace buffers by empty ones."""
    found = pivoted(factors(*shape, 10), of_columns=shape[0] > shape[1])
    with torch.device("meta"):
        module = PivotedLinear(
            torch.empty(found.pivots.shape),
            torch.empty(found.combinations.shape),
            found.chosen,
            of_columns=found.of_columns,
        )
    order = module.order.clone()
    module.to_empty(device="cpu")
    module.order.zero_()
    module.set_order()
    assert module.order.tolist() == order.tolist()
    module.load_state_dict({"pivots.weight": found.pivots, "combinations.weight": found.combinations})
    torch.testing.assert_close(module(torch.eye(shape[1])).T, found.product(), rtol=1e-4, atol=1e-4)


def test_pivots_are_exact_rows_and_columns_of_the_matrix() -> None:
    for shape in ((30, 12), (12, 30)):
        plain = factors(*shape, 5)
        found, whole = pivoted(plain, of_columns=shape[0] > shape[1]), plain.product()
        chosen = found.columns_or_rows[:5]
        own = whole[:, chosen] if found.of_columns else whole[chosen]
        torch.testing.assert_close(found.pivots, own, rtol=1e-5, atol=1e-5)


def test_combinations_stay_small() -> None:
    """A volume-maximal choice of rows has no coefficient above 1; exchanges stop a little above."""
    for shape in ((200, 120), (120, 200)):
        plain = factors(*shape, 60)
        scales = 10 ** -torch.linspace(0, 3, 60)  # singular values of trained weights decay
        found = pivoted(LowRankFactors(plain.left * scales, plain.right), of_columns=shape[0] > shape[1])
        assert float(found.combinations.abs().max()) <= 1.5
        expected = (plain.left * scales).double() @ plain.right.double()
        assert float((found.product() - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_a_pivoted_point_computes_what_two_factors_compute(family: str, tmp_path: Path) -> None:
    loaded = loaded_tiny_model(family, initializer_range=0.2)
    names = {tensor.name: 5 for tensor in loaded.topology.tensors if tensor.layer == 1}
    plain = DesignPoint.of({name: TensorChoice("svd", rank) for name, rank in names.items()})
    point = DesignPoint.of({name: TensorChoice("svd", rank, form="pivoted") for name, rank in names.items()})
    bank = FactorBank.build(loaded, [plain], None, folder=tmp_path)
    token_ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with torch.inference_mode():
        dense = loaded.model(input_ids=token_ids)[0]
        with decompose(loaded, plain, bank):
            expected = loaded.model(input_ids=token_ids)[0]
        with decompose(loaded, point, bank):
            found = loaded.model(input_ids=token_ids)[0]
            parameters = sum(p.numel() for p in loaded.model.parameters())
            nbytes = sum(t.numel() * t.element_size() for t in loaded.model.state_dict().values())
        assert not torch.allclose(expected, dense, atol=1e-3)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    cost = point_cost(loaded.topology, point)
    assert parameters == cost.parameters < point_cost(loaded.topology, plain).parameters
    shared = point_cost(loaded.topology, DesignPoint.dense()).weight_bytes
    whole = sum(t.numel() * t.element_size() for t in before.values())
    assert nbytes - whole == cost.weight_bytes - shared
    after = loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_points_read_and_refuse_the_form(tmp_path: Path) -> None:
    topology = loaded_tiny_model("llama").topology
    text = {"tensors": {"layers.0.up": {"method": "svd", "rank": 30, "form": "pivoted"}}}
    point = DesignPoint.from_json(text, topology)
    assert point.to_json() == text
    check_point(topology, point)  # above the break-even rank of two factors
    with pytest.raises(RankError, match="rank <= 31"):
        check_point(topology, DesignPoint.of({"layers.0.up": TensorChoice("svd", 32, form="pivoted")}))
    with pytest.raises(PointError, match="single matrices"):
        check_point(topology, DesignPoint.of({"layers.0.query_key_value": TensorChoice("svd", 3, form="pivoted")}))
    for method, rank in (("tucker", 2), ("width", 3), ("removed", 0)):
        with pytest.raises(PointError, match="two factors"):
            TensorChoice(method, rank, form="pivoted")
    with pytest.raises(PointError, match="must be 'pivoted'"):
        TensorChoice("svd", 2, form="sideways")


def test_allocations_spend_the_same_parameters_on_higher_ranks(tmp_path: Path) -> None:
    loaded = loaded_tiny_model("llama", initializer_range=0.2)
    curves = {
        tensor.name: torch.linalg.svdvals(loaded.model.get_submodule(tensor.module).weight).square().flip(0).cumsum(0)
        for tensor in loaded.topology.tensors
        if tensor.layer is not None
    }
    left_out = {name: torch.cat((torch.zeros(1), tail)).flip(0).numpy() for name, tail in curves.items()}
    plain = allocate_curves(loaded.topology, left_out, 0.3, method="svd")
    found = allocate_curves(loaded.topology, left_out, 0.3, method="svd", form="pivoted")
    assert found.divergence < plain.divergence
    assert point_cost(loaded.topology, found.point).reduction == pytest.approx(found.reduction)
    assert found.reduction >= 0.3
    bank = FactorBank.build(loaded, [found.point], None, folder=tmp_path)
    with decompose(loaded, found.point, bank):
        loaded.model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_a_bank_holds_ranks_that_only_pivoted_factors_can_have(tmp_path: Path) -> None:
    loaded = loaded_tiny_model("llama", initializer_range=0.2)
    point = DesignPoint.of({"layers.1.up": TensorChoice("svd", 30, form="pivoted")})
    bank = FactorBank.build(loaded, [point], None, folder=tmp_path)
    assert bank.factors("layers.1.up", TensorChoice("svd", 30, form="pivoted")).rank == 30
    with pytest.raises(RankError):
        FactorBank.build(loaded, {"svd": {"layers.1.query_key_value": 31}}, None, folder=tmp_path / "stack")


def test_a_refit_is_the_same_in_both_forms(tmp_path: Path) -> None:
    """Factors are refitted first, and their independent rows or columns are found then."""
    loaded = loaded_tiny_model("llama", initializer_range=0.2)
    tokens = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(2))
    names = [tensor.name for tensor in loaded.topology.tensors if tensor.layer in (1, 2)]
    found = []
    for form in ("", PIVOTED):
        point = DesignPoint.of({name: TensorChoice("fisher_svd_refit", 6, form=form) for name in names})
        bank = FactorBank.build(loaded, [point], windows_of(tokens), folder=tmp_path / f"bank-{form}")
        with torch.inference_mode(), decompose(loaded, point, bank):
            found.append(loaded.model(input_ids=tokens)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
