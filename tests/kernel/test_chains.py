from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler

from dse.kernel import FEW_ROWS, ChainMatrix, KernelChains
from dse.runtime.packing import LaidOutWeights, WeightRequest
from dse.runtime.products import Chain, SharedProduct


def packed(chains):
    """Flat weights of random chains (lists of (rows, columns, has bias)), and where each matrix lies in it."""
    generator = torch.Generator().manual_seed(sum(rows * columns for chain in chains for rows, columns, _ in chain))
    pieces, places = [torch.randn(3, generator=generator)], []
    end = 3  # so that nothing is aligned by chance
    for chain in chains:
        places.append([])
        for rows, columns, has_bias in chain:
            pieces.append(torch.randn(rows * columns, generator=generator) / columns**0.5)
            pieces.append(torch.randn(rows if has_bias else 0, generator=generator))
            places[-1].append(ChainMatrix(rows, columns, end, end + rows * columns if has_bias else None))
            end += rows * columns + len(pieces[-1])
    return torch.cat(pieces), places


def one_by_one(flat, places, x):
    """The same in double precision, a matrix at a time."""
    results = []
    for chain in places:
        y = x.double()
        for m in chain:
            weight = flat[m.weight_at :][: m.rows * m.columns].view(m.rows, m.columns).double()
            bias = 0.0 if m.bias_at is None else flat[m.bias_at :][: m.rows].double()
            y = y @ weight.T + bias
        results.append(y)
    return torch.cat(results, dim=-1)


@st.composite
def chain_shapes(draw):
    columns = draw(st.integers(1, 80))
    chains = []
    for _ in range(draw(st.integers(1, 3))):
        widths = [columns, *draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))]
        chains.append([(rows, inner, draw(st.booleans())) for inner, rows in itertools.pairwise(widths)])
    return chains


def check(chains, rows, threads):
    """The kernel against products one by one."""
    flat, places = packed(chains)
    x = torch.randn(rows, 1, chains[0][0][1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = KernelChains(flat, places)(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), one_by_one(flat, places, x), rtol=1e-4, atol=1e-4)


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(chain_shapes(), st.integers(1, FEW_ROWS) | st.integers(FEW_ROWS + 1, 200), st.sampled_from([1, 2, 3, 7]))
def test_the_kernel_agrees_with_products_one_by_one(chains, rows, threads):
    check(chains, rows, threads)


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(
    columns=st.sampled_from([15, 16, 17, 255, 256, 257, 511, 768, 769, 1000, 1541]),
    out=st.integers(1, 40),
    rows=st.integers(1, FEW_ROWS),
    has_bias=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
)
def test_thin_and_wide_weights_by_few_rows(columns, out, rows, has_bias, threads):
    """Weights are read in stretches and some rows at a time, wide ones otherwise than thin ones."""
    check([[(out, columns, has_bias)]], rows, threads)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 65])
def test_long_sums_lose_no_more_than_those_of_a_library(rows):
    """Numbers added up one after the other; a large one among them must not swallow the others."""
    torch.manual_seed(0)
    weight, x = torch.randn(7, 3000), torch.randn(rows, 3000)
    x[:, 1] *= 1e4
    expected = x.double() @ weight.double().T
    found = KernelChains(weight.view(-1), [[ChainMatrix(7, 3000, 0)]])(x)

    def deviation(result):
        return float((result.double() - expected).abs().max())

    assert deviation(found) <= 4 * deviation(x @ weight.T)


@needs_compiler
def test_input_that_does_not_lie_row_by_row():
    flat, places = packed([[(8, 6, True)]])
    x = torch.randn(6, 4).T
    torch.testing.assert_close(
        KernelChains(flat, places)(x).double(), one_by_one(flat, places, x), rtol=1e-5, atol=1e-5
    )


@needs_compiler
@pytest.mark.parametrize("column", range(1, 8))
def test_a_layout_that_points_outside_its_tensors_is_refused(column):
    flat, places = packed([[(5, 4, True), (3, 5, True)]])
    chains = KernelChains(flat, places)
    chains.layout[-1, column] = 10**6
    if column == 7:
        chains.layout[-1, 6] = -1  # the last product writes to the result
    with pytest.raises(RuntimeError, match="must lie within its tensors"):
        chains(torch.randn(1, 4))


def test_what_the_kernel_is_not_asked_for():
    chains = KernelChains(*packed([[(3, 4, False)]]))
    assert chains.takes(torch.randn(FEW_ROWS, 4))
    assert not chains.takes(torch.randn(FEW_ROWS + 1, 4))
    for many in ("torch", "panels"):
        chains.many = many
        assert chains.takes(torch.randn(FEW_ROWS + 1, 4)) == (many == "panels")
        assert not chains.takes(torch.randn(0, 4))
        assert not chains.takes(torch.randn(1, 4, dtype=torch.bfloat16))
        assert not chains.takes(torch.randn(1, 4, requires_grad=True))
        with torch.no_grad():
            assert chains.takes(torch.randn(1, 4, requires_grad=True))
    assert not KernelChains.is_for(torch.randn(8, dtype=torch.float64))


def shared_product():
    """Two modules, one of them a chain; with the kernel and without."""
    torch.manual_seed(0)
    first, second, bias = torch.randn(7 + 5, 6), torch.randn(9, 5), torch.randn(9)
    requests = [WeightRequest([first], [None], "row_major"), WeightRequest([second], [[bias]], "row_major")]
    found = LaidOutWeights().get(requests)
    matrices = [ChainMatrix(7, 6, 0), ChainMatrix(5, 6, 7 * 6)]
    last = ChainMatrix(9, 5, found.place(found.products[1].weight_data), found.place(found.products[1].bias))
    kernel = KernelChains(found.flat, [[matrices[0]], [matrices[1], last]])
    chains = [Chain(7), Chain(5, found.products[1:])]
    return SharedProduct(found.products[0], chains, kernel), SharedProduct(found.products[0], chains)


@needs_compiler
def test_few_rows_go_to_the_kernel_and_many_to_the_library():
    with_kernel, without = shared_product()
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, 6)
        with torch.profiler.profile() as profile:
            found = with_kernel(x)
        calls = {event.key for event in profile.key_averages()}
        assert ("dse::chains" in calls) == (rows <= FEW_ROWS)
        for part, expected in zip(found, without(x), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_copy_of_a_model_has_weights_of_its_own():
    module, _ = shared_product()
    other = copy.deepcopy(module)
    x = torch.randn(1, 6)
    before = module(x)[0]
    with torch.no_grad():
        other.kernel.weights.zero_()
    assert torch.equal(module(x)[0], before)
    assert not torch.equal(other(x)[0], before)


@needs_compiler
def test_compiled_programs_call_the_kernel():
    module, without = shared_product()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler stack's own
        compiled = torch.compile(module, dynamic=False)
        for _ in range(2):
            x = torch.randn(2, 6)
            for part, expected in zip(compiled(x), without(x), strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
