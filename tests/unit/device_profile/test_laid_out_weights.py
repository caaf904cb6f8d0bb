from __future__ import annotations

import pytest
import torch
from torch import nn

from dse.errors import InvalidMeasurementError
from dse.runtime.packing import LaidOutWeights, WeightRequest
from dse.runtime.products import Product


def test_a_lone_weight_is_not_copied():
    weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    found = LaidOutWeights().get([WeightRequest([weight], [None], "row_major")])
    assert found.products[0].weight_data is weight
    assert found.flat.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_read_together_lie_together(dtype):
    weight, bias = torch.randn(5, 3, dtype=dtype), torch.randn(5, dtype=dtype)
    found = LaidOutWeights().get(
        [
            WeightRequest([weight, weight], [[bias], None], "row_major"),
            WeightRequest([weight], [None], "column_major"),
        ]
    )
    first, second = found.products
    assert torch.equal(first.weight_data, torch.cat([weight, weight]))
    assert torch.equal(first.bias, torch.cat([bias, torch.zeros(5, dtype=dtype)]))
    assert torch.equal(second.weight_data, weight.T)
    assert second.bias is None
    for tensor in (first.weight_data, first.bias, second.weight_data):
        assert tensor.untyped_storage().data_ptr() == found.flat.untyped_storage().data_ptr()
        assert torch.equal(found.flat[found.place(tensor) :][: tensor.numel()], tensor.flatten())


@pytest.mark.parametrize("has_biases", [False, True])
def test_what_is_known_is_shared_and_what_is_asked_twice_is_made_once(has_biases):
    weights, biases = [torch.randn(4, 3), torch.randn(2, 3)], [[torch.randn(4)], [torch.randn(2)]]

    def asked(layout):
        return [WeightRequest(list(weights), biases if has_biases else [None, None], layout)]

    known = LaidOutWeights()
    product = known.get(asked("row_major")).products[0]
    assert isinstance(product, Product)
    assert known.get(asked("row_major")).products[0] is product
    assert LaidOutWeights(known).get(asked("row_major")).products[0] is product
    assert known.get(asked("column_major")).products[0] is not product
    biases[0] = [torch.randn(4)]
    assert (known.get(asked("row_major")).products[0] is product) == (not has_biases)


def test_a_stack_of_which_only_some_modules_have_a_bias_is_refused():
    request = WeightRequest([torch.randn(4, 3)], [[torch.randn(2), None]], "row_major")
    with pytest.raises(InvalidMeasurementError, match="must all have a bias or none"):
        LaidOutWeights().get([request])
