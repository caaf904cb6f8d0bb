from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler

from dse.kernel import attend, can_attend


def reference(query, key, value, mask, scaling):
    """Softmax attention in double precision, the cache repeated for each query head."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (cached.double().repeat_interleave(repeats, dim=1) for cached in (key, value))
    weights = torch.softmax(query.double() @ key.transpose(2, 3) * scaling + mask.double(), dim=-1)
    return (weights @ value).transpose(1, 2)


@needs_compiler
@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 5),
    positions=st.integers(1, 70),
    columns=st.sampled_from([1, 8, 20, 64, 80, 128]),
    value_columns=st.sampled_from([1, 16, 64, 130]),
    lowest=st.sampled_from([torch.finfo(torch.float32).min, -float("inf")]),
    threads=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 1000),
)
def test_it_is_softmax_attention(batch, heads, group, positions, columns, value_columns, lowest, threads, seed):
    """Any part of the cache masked, whole stretches of threads included, but never all of it."""
    torch.manual_seed(seed)
    query = torch.randn(batch, heads * group, 1, columns)
    key = torch.randn(batch, heads, positions, columns)
    value = torch.randn(batch, heads, positions, value_columns)
    mask = torch.zeros(batch, 1, 1, positions)
    for row in mask.view(batch, positions):
        row[torch.randint(1, positions + 1, ()) :] = lowest
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend(query, key, value, mask, columns**-0.5)
    finally:
        torch.set_num_threads(before)
    expected = reference(query, key, value, mask, columns**-0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_scores_far_apart_neither_overflow_nor_lose_the_largest():
    key = torch.tensor([300.0, -300.0, 299.0, 0.0]).view(1, 1, 4, 1)
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 4, 1)
    found = attend(torch.ones(1, 1, 1, 1), key, value, torch.zeros(1, 1, 1, 4), 1.0)
    first, second = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    assert float(found) == pytest.approx(float(first + 100 * second), rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("positions", [slice(3, 4), slice(0, 10), slice(0, 20)])
def test_not_a_number_is_not_hidden(positions):
    key = torch.randn(1, 1, 20, 8)
    key[0, 0, positions] = float("nan")
    found = attend(torch.randn(1, 2, 1, 8), key, torch.randn(1, 1, 20, 16), torch.zeros(1, 1, 1, 20), 1.0)
    assert bool(found.isnan().all())


@needs_compiler
def test_one_mask_for_all_sequences_and_queries_that_do_not_lie_in_order():
    query = torch.randn(2, 1, 6, 8).transpose(1, 2)
    key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([0.0, 0.0, 0.0, -float("inf"), -float("inf")]).view(1, 1, 1, 5)
    found = attend(query, key, value, mask, 0.5)
    torch.testing.assert_close(found.double(), reference(query, key, value, mask, 0.5), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("change", [{"key": (1, 2, 5, 8)}, {"value": (1, 3, 4, 8)}, {"mask": (1, 1, 2, 5)}])
def test_what_does_not_fit_is_refused(change):
    shapes = {"query": (1, 3, 1, 8), "key": (1, 3, 5, 8), "value": (1, 3, 5, 8), "mask": (1, 1, 1, 5), **change}
    with pytest.raises(RuntimeError, match="must"):
        torch.ops.dse.attend(*(torch.zeros(shape) for shape in shapes.values()), 1.0)


def test_what_the_kernel_is_not_asked_for():
    query, cache, mask = torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 5, 8), torch.zeros(1, 1, 1, 5)
    assert can_attend(query, cache, cache, mask)
    assert not can_attend(torch.zeros(1, 3, 2, 8), cache, cache, mask)
    assert not can_attend(query.double(), cache, cache, mask)
    assert not can_attend(query, cache, cache, torch.zeros(1, 3, 1, 5))
    assert not can_attend(query.requires_grad_(), cache, cache, mask)
