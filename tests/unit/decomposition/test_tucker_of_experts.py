"""Tucker decompositions of fused expert tensors against closed forms and truncated HOSVD."""

from __future__ import annotations

import itertools

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.decomposition import TuckerFactors, tucker_of_experts
from dse.errors import NonFiniteError, RankError
from dse.expert_tensor import ExpertTensor

SHAPE = (4, 12, 9)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def random_tensor(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def truncated_hosvd_error(weight: torch.Tensor, ranks: tuple[int, ...]) -> float:
    """|W - W x_1 U1 U1^T x_2 ...|| with bases from SVDs of the unfoldings, computed without tensorly."""
    result = weight.double()
    for mode, rank in enumerate(ranks):
        basis = torch.linalg.svd(weight.double().movedim(mode, 0).flatten(1), full_matrices=False)[0][:, :rank]
        result = torch.tensordot(basis @ basis.T, result, dims=([1], [mode])).movedim(0, mode)
    return float((weight.double() - result).norm())


def test_full_rank_returns_the_weight_unchanged() -> None:
    weight = random_tensor()
    factors = tucker_of_experts(weight, SHAPE)
    assert torch.equal(factors.product(), weight)
    assert factors.experts is factors.left is factors.right is None


@pytest.mark.parametrize("ranks", [(4, 12, 8), (4, 11, 9), (3, 12, 9), (4, 5, 9), (2, 5, 3), (1, 1, 1), (4, 1, 1)])
def test_modes_of_full_rank_have_no_factor(ranks: tuple[int, int, int]) -> None:
    factors = tucker_of_experts(random_tensor(), ranks)
    assert factors.ranks == ranks
    assert factors.shape == SHAPE
    given = [factors.experts is not None, factors.left is not None, factors.right is not None]
    assert given == [rank < size for rank, size in zip(ranks, SHAPE, strict=True)]


@pytest.mark.parametrize("ranks", [(4, 3, 3), (2, 3, 4), (2, 12, 9), (4, 12, 2), (3, 2, 5)])
def test_tensors_of_low_multilinear_rank_are_found_exactly(ranks: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ranks, generator=generator, dtype=torch.float64)
    for mode, (size, rank) in enumerate(zip(SHAPE, ranks, strict=True)):
        weight = torch.tensordot(orthonormal(size, rank, generator), weight, dims=([1], [mode])).movedim(0, mode)
    assert torch.allclose(tucker_of_experts(weight, ranks).product(), weight.float(), atol=1e-5)


def test_error_of_a_superdiagonal_core_equals_the_omitted_entries() -> None:
    """W = sum_a s_a u_a o v_a o w_a with orthonormal vectors: the best rank (r, r, r) omits the smallest s."""
    generator = torch.Generator().manual_seed(2)
    strengths = torch.tensor([5.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    bases = [orthonormal(size, 4, generator) for size in SHAPE]
    weight = torch.einsum("a,ea,oa,ia->eoi", strengths, *bases)
    for rank in (1, 2, 3):
        product = tucker_of_experts(weight, (rank, rank, rank)).product().double()
        left_out = strengths[rank:].square().sum().sqrt()
        assert float((weight - product).norm()) == pytest.approx(float(left_out), abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.integers(1, 9))
def test_iteration_is_no_worse_than_truncated_hosvd(seed: int, a: int, b: int, c: int) -> None:
    weight, ranks = random_tensor(seed), (min(a, b * c), min(b, a * c), min(c, a * b))
    error = float((weight.double() - tucker_of_experts(weight, ranks).product().double()).norm())
    assert error <= truncated_hosvd_error(weight, ranks) + 1e-4


def test_iteration_improves_on_truncated_hosvd() -> None:
    gains = []
    for seed in range(5):
        weight = random_tensor(seed)
        error = float((weight - tucker_of_experts(weight, (2, 3, 3)).product()).norm())
        gains.append(truncated_hosvd_error(weight, (2, 3, 3)) - error)
    assert min(gains) > 1e-3


def test_factors_are_orthonormal_and_deterministic() -> None:
    weight = random_tensor(3)
    first, second = (tucker_of_experts(weight, (3, 5, 4)) for _ in range(2))
    assert first.experts is not None
    assert first.left is not None
    assert first.right is not None
    for columns in (first.experts, first.left, first.right.T):
        assert torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5)
    assert torch.equal(first.product(), second.product())


def test_tensorlys_backend_is_restored() -> None:
    before = tensorly.get_backend()
    tucker_of_experts(random_tensor(), (2, 2, 2))
    assert tensorly.get_backend() == before


def test_invalid_ranks_and_non_finite_weights_are_refused() -> None:
    for ranks in ((0, 1, 1), (5, 1, 1), (1, 13, 1), (1, 1, 10), (1, 5, 4), (3, 1, 1)):
        with pytest.raises(RankError, match=r"must hold in a mode of size.*4 x 12 x 9"):
            tucker_of_experts(random_tensor(), ranks)
    weight = random_tensor()
    weight[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="4 x 12 x 9"):
        tucker_of_experts(weight, (1, 1, 1))


def test_factors_must_chain() -> None:
    with pytest.raises(ValueError, match="factors must chain"):
        TuckerFactors(torch.zeros(2, 3, 3), torch.zeros(4, 3))


def tensor_of(experts: int, m: int, n: int, chosen: int = 2, role: str = "expert_gate_up") -> ExpertTensor:
    return ExpertTensor(f"layers.0.{role}", "experts", "weight", 0, role, experts, m, n, chosen)


@pytest.mark.parametrize("expert_rank", [0, 1, 2, 3])
def test_parameter_counts_match_the_factors(expert_rank: int) -> None:
    tensor = tensor_of(*SHAPE)
    for rank in range(1, 13):
        factors = tucker_of_experts(random_tensor(), tensor.ranks(rank, expert_rank))
        held = [t for t in (factors.core, factors.experts, factors.left, factors.right) if t is not None]
        assert tensor.factor_parameters(rank, expert_rank) == sum(t.numel() for t in held)


def test_rank_one_by_hand() -> None:
    tensor = tensor_of(8, 28672, 4096)  # Mixtral-8x7B's gate_up_proj
    assert tensor.factor_parameters(1) == 8 + 28672 + 4096
    assert tensor.factor_parameters(1, 1) == 1 + 8 + 28672 + 4096
    assert tensor.factor_parameters(256) == 8 * 256**2 + 256 * (28672 + 4096)
    # `read` applies the right factor once, two cores and two left factors; `write` the other way round.
    assert tensor.factor_matmul_parameters(256) == 256 * 4096 + 2 * 256**2 + 2 * 256 * 28672
    down = tensor_of(8, 4096, 14336, role="expert_down")
    assert down.factor_matmul_parameters(256) == 2 * 256 * 14336 + 2 * 256**2 + 256 * 4096
    # Three shared cores for every token, and two mixtures of them.
    assert tensor.factor_matmul_parameters(64, 3) == 64 * 4096 + 3 * 64**2 + 2 * 3 * 64 + 2 * 64 * 28672
    assert down.factor_matmul_parameters(64, 3) == 2 * 64 * 14336 + 2 * 3 * 64 + 3 * 64**2 + 64 * 4096
    assert tensor.matmul_parameters == 2 * 28672 * 4096


def test_break_even_by_hand() -> None:
    # 8 r^2 + 200 r <= 8 * 100 * 100 holds up to r = 88.28, close to sqrt(mn) = 100; a single expert would have 50.
    assert tensor_of(8, 100, 100).break_even_rank() == 88
    # From rank 50 on the smaller mode is full, and 8 * 50 r + 100 r <= 8 * 100 * 50 holds up to 80.
    assert tensor_of(8, 100, 50).break_even_rank() == 80
    # 1 * r^2 + 200 r + 8 <= 80000 holds even beyond rank 100, where only the expert mode is truncated.
    assert tensor_of(8, 100, 100).break_even_rank(1) == 100
    assert tensor_of(1, 1, 1).break_even_rank() == 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.integers(0, 10000))
def test_largest_rank_is_the_last_rank_that_fits(e: int, m: int, n: int, kept: int, budget: int) -> None:
    tensor, kept = tensor_of(e, m, n), kept if kept < e else 0
    ranks = range(1, max(m, n) + (1 if kept else 0))
    fitting = list(itertools.takewhile(lambda rank: tensor.factor_parameters(rank, kept) <= budget, ranks))
    # The count drops slightly when a mode becomes full, so a rank that fits may follow one that does not.
    assert tensor.largest_rank(budget, kept) == max(fitting, default=1)
