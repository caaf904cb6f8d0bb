from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dse.decomposition import LowRankLinear
from dse.decomposition.low_rank_modules import NormThenFactor, linear_from


@given(leading=st.lists(st.integers(1, 4), max_size=3), has_bias=st.booleans(), has_core=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_leading_shape_equals_the_dense_product(leading: list[int], has_bias: bool, has_core: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = rand(7, 3), rand(3, 5)
    bias, core = (rand(7) if has_bias else None), (rand(3, 3) if has_core else None)
    module = LowRankLinear(left, right, bias, core)
    x = rand(*leading, 5)
    weight = left @ (core if core is not None else torch.eye(3, dtype=torch.float64)) @ right
    expected = torch.einsum("mn,...n->...m", weight, x) + (bias if bias is not None else 0)
    torch.testing.assert_close(module(x), expected)
    assert (module.out_features, module.in_features, module.rank) == (7, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    module = LowRankLinear(torch.ones(4, 2, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.zeros(4, dtype=dtype))
    out = module(torch.ones(2, 3, dtype=dtype))
    assert out.dtype == dtype
    assert out.tolist() == [[6.0] * 4] * 2


def test_an_empty_batch_gives_an_empty_output() -> None:
    module = LowRankLinear(torch.ones(4, 2), torch.ones(2, 3))
    assert module(torch.empty(0, 3)).shape == (0, 4)


def test_state_dict_names_match_those_of_exports() -> None:
    module = LowRankLinear(torch.ones(4, 2), torch.ones(2, 3), torch.ones(4), torch.ones(2, 2))
    assert set(module.state_dict()) == {"left.weight", "left.bias", "right.weight", "core.weight"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert "rank=2" in repr(module)


@pytest.mark.parametrize("has_bias", [False, True])
def test_factors_are_plain_linear_layers_around_the_given_tensors(has_bias: bool) -> None:
    """Engines replace exactly `nn.Linear`; a linear layer built by torch has the same attributes."""
    left, bias = torch.ones(4, 2), nn.Parameter(torch.ones(4), requires_grad=False) if has_bias else None
    found = linear_from(left, bias)
    built = nn.Linear(2, 4, bias=has_bias)
    assert type(found) is nn.Linear
    assert found.weight.data_ptr() == left.data_ptr()
    assert found.bias is bias
    assert vars(found).keys() == vars(built).keys()
    assert repr(found) == repr(built)


@pytest.mark.parametrize("has_core", [False, True])
def test_a_norm_then_a_factor_equals_the_norm_and_the_low_rank_layer(has_core: bool) -> None:
    torch.manual_seed(0)
    norm, left, right = nn.LayerNorm(5), torch.randn(7, 3), torch.randn(3, 5)
    core = torch.randn(3, 3) if has_core else None
    x = torch.randn(2, 4, 5)
    narrow = NormThenFactor(norm, right, core)
    assert narrow(x).shape == (2, 4, 3)
    assert torch.equal(linear_from(left)(narrow(x)), LowRankLinear(left, right, None, core)(norm(x)))
    names = {"norm.weight", "norm.bias", "right.weight"} | ({"core.weight"} if has_core else set())
    assert set(narrow.state_dict()) == names
