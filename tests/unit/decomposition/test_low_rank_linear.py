from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.decomposition import LowRankLinear


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
    assert set(module.state_dict()) == {"left", "right", "core", "bias"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert "rank=2, core" in repr(module)
