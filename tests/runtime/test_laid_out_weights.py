from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from dse.runtime.huge_pages import HUGE_PAGE_BYTES, HugePages, prefer_huge_pages
from dse.runtime.packing import LaidOutWeights, WeightRequest
from dse.runtime.products import Product


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


def test_a_large_lone_weight_is_not_copied():
    weight = nn.Parameter(torch.randn(4096, 2048), requires_grad=False)
    found = LaidOutWeights().get([WeightRequest([weight], None, "row_major")])
    assert found.products[0].weight_data is weight
    assert found.flat.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_read_together_lie_together(dtype):
    weight, bias = torch.randn(5, 3, dtype=dtype), torch.randn(10, dtype=dtype)
    found = LaidOutWeights().get(
        [WeightRequest([weight, weight], bias, "row_major"), WeightRequest([weight], None, "column_major")]
    )
    first, second = found.products
    assert torch.equal(first.weight_data, torch.cat([weight, weight]))
    assert torch.equal(first.bias, bias)
    assert torch.equal(second.weight_data, weight.T)
    for tensor in (first.weight_data, first.bias, second.weight_data):
        assert tensor.untyped_storage().data_ptr() == found.flat.untyped_storage().data_ptr()
        assert torch.equal(found.flat[found.place(tensor) :][: tensor.numel()], tensor.flatten())


def test_what_is_known_is_shared_and_what_is_asked_twice_is_made_once():
    weight = torch.randn(4, 3)
    request = WeightRequest([weight], None, "row_major")
    known = LaidOutWeights()
    product = known.get([request]).products[0]
    assert isinstance(product, Product)
    assert known.get([WeightRequest([weight], None, "row_major")]).products[0] is product
    assert LaidOutWeights(known).get([request]).products[0] is product
    assert known.get([WeightRequest([weight], None, "column_major")]).products[0] is not product


def test_tensors_of_huge_pages_are_apart_and_begin_with_a_page():
    pages = HugePages()
    tensors = [pages.empty(entries, torch.float32) for entries in (1, 5000, 40 * HUGE_PAGE_BYTES // 4, 3)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert bool((tensor == value).all())
        assert tensor.data_ptr() % 64 == 0
    assert [len(tensor) for tensor in tensors] == [1, 5000, 40 * HUGE_PAGE_BYTES // 4, 3]


def test_their_memory_is_given_back():
    pages = HugePages()
    before = resident_bytes()
    tensor = pages.empty(200 * 2**20 // 4, torch.float32).fill_(1)
    assert resident_bytes() - before > 190 * 2**20
    del tensor, pages
    gc.collect()
    assert resident_bytes() - before < 20 * 2**20


def test_wishing_for_huge_pages_changes_no_number():
    for entries in (1, 8 * 2**20):
        tensor = torch.arange(entries, dtype=torch.float32)
        expected = tensor.clone()
        prefer_huge_pages(tensor)
        assert torch.equal(tensor, expected)
