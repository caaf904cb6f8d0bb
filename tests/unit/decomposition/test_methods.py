"""The conformance suite of all methods, and the tests of each method."""

from __future__ import annotations

import pytest
import tensorly
import torch
from decomposition_support import SHAPES, gradients_of, gram_of, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker

from dse.decomposition import (
    METHODS,
    LowRankFactors,
    factorise,
    fisher_svd,
    truncated_svd,
    tucker,
    tucker_merged,
    whitened_svd,
)
from dse.decomposition.svd_methods import warn_of_damping
from dse.design_point import METHOD_NAMES, WIDTH
from dse.errors import CalibrationError, NonFiniteError, RankError


def test_methods_match_the_names_that_points_accept() -> None:
    assert set(METHODS) == {*METHOD_NAMES, WIDTH}


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("shape", SHAPES)
class TestEveryMethod:
    def test_full_rank_reproduces_the_weight(self, method: str, shape: tuple[int, int]) -> None:
        weight = weight_of(shape)
        factors = factorise(weight, method, min(shape), gram_of(shape[1]), gradients_of(shape[0]))
        torch.testing.assert_close(factors.product(), weight, atol=2e-4, rtol=1e-4)

    def test_truncating_equals_decomposing_at_the_smaller_rank(self, method: str, shape: tuple[int, int]) -> None:
        weight, grams = weight_of(shape), (gram_of(shape[1]), gradients_of(shape[0]))
        sliced = factorise(weight, method, 6, *grams).truncated(2)
        expected = factorise(weight, method, 2, *grams)
        torch.testing.assert_close(sliced.product(), expected.product(), atol=1e-4, rtol=1e-3)

    def test_shapes_dtype_and_layout(self, method: str, shape: tuple[int, int]) -> None:
        factors = factorise(weight_of(shape).to(torch.bfloat16), method, 3, gram_of(shape[1]), gradients_of(shape[0]))
        assert factors.left.shape == (shape[0], 3)
        assert factors.right.shape == (3, shape[1])
        assert (factors.core is not None) == (method == "tucker")
        assert factors.left.dtype == factors.right.dtype == torch.float32
        assert factors.left.is_contiguous()
        assert factors.right.is_contiguous()

    @pytest.mark.parametrize("rank", [0, -3, 100])
    def test_a_rank_outside_the_interval_is_refused(self, method: str, shape: tuple[int, int], rank: int) -> None:
        with pytest.raises(RankError, match=rf"`1 <= rank <= {min(shape)}` .* got rank={rank}"):
            factorise(weight_of(shape), method, rank, gram_of(shape[1]), gradients_of(shape[0]))

    def test_non_finite_weights_are_refused(self, method: str, shape: tuple[int, int]) -> None:
        weight = weight_of(shape)
        weight[1, 1] = float("nan")
        with pytest.raises(NonFiniteError):
            factorise(weight, method, 2, gram_of(shape[1]), gradients_of(shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd", "tucker", "tucker_merged"])
def test_error_is_the_tail_of_the_singular_values(method: str, shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    for rank in (1, 3, 5):
        tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
        error = torch.linalg.norm(weight - factorise(weight, method, rank).product())
        torch.testing.assert_close(error, tail, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_error_is_the_tail_of_the_whitened_singular_values(shape: tuple[int, int]) -> None:
    weight, gram = weight_of(shape).double(), gram_of(shape[1]).double()
    root = torch.linalg.cholesky(gram)
    for rank in (1, 3, 5):
        tail = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
        residual = weight - whitened_svd(weight, rank, gram).product()
        torch.testing.assert_close(torch.trace(residual @ gram @ residual.T), tail, atol=1e-6, rtol=1e-3)


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6), wide=st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_perturbation_of_the_whitened_factors_does_better(seed: int, rank: int, wide: bool) -> None:
    """Optimality by an independent criterion: random steps from the solution never lower the activation error."""
    shape = (8, 12) if wide else (12, 8)
    weight, gram = weight_of(shape, seed).double(), gram_of(shape[1], seed + 1).double()
    factors = whitened_svd(weight, rank, gram)
    left, right = factors.left.double(), factors.right.double()

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        residual = weight - a @ b
        return float(torch.trace(residual @ gram @ residual.T))

    best = error(left, right)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-2, 1e-1):
        step_left = torch.randn(left.shape, generator=generator, dtype=torch.float64) * size
        step_right = torch.randn(right.shape, generator=generator, dtype=torch.float64) * size
        assert error(left + step_left, right + step_right) >= best * (1 - 1e-4) - 1e-9


def test_whitening_equals_an_independent_implementation() -> None:
    """For m <= n the optimum is U U^T W with U the leading eigenvectors of W G W^T; for m > n solve by Cholesky."""
    for shape in SHAPES:
        weight, gram = weight_of(shape).double(), gram_of(shape[1]).double()
        vectors = torch.linalg.eigh(weight @ gram @ weight.T).eigenvectors[:, -3:]
        expected = vectors @ vectors.T @ weight
        torch.testing.assert_close(whitened_svd(weight, 3, gram).product().double(), expected, atol=1e-4, rtol=1e-3)


def test_whitening_with_the_identity_equals_the_plain_svd() -> None:
    weight = weight_of((12, 8))
    torch.testing.assert_close(
        whitened_svd(weight, 3, torch.eye(8)).product(), truncated_svd(weight, 3).product(), atol=1e-5, rtol=1e-4
    )


def test_scaling_the_gram_changes_nothing() -> None:
    weight, gram = weight_of((12, 8)), gram_of(8)
    torch.testing.assert_close(
        whitened_svd(weight, 3, gram).product(), whitened_svd(weight, 3, 1e6 * gram).product(), atol=1e-4, rtol=1e-3
    )


def test_a_singular_gram_matrix_is_damped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_damping.cache_clear()
    few_tokens = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    gram = few_tokens.T @ few_tokens
    weight = weight_of((12, 8))
    for _ in range(2):
        factors = whitened_svd(weight, 4, gram)
    # Four directions carry all activations, so rank 4 must reproduce the outputs.
    torch.testing.assert_close(few_tokens @ factors.product().T, few_tokens @ weight.T, atol=1e-3, rtol=1e-3)
    assert sum("not positive definite" in record.message for record in caplog.records) == 1


def test_whitening_refuses_invalid_gram_matrices() -> None:
    weight = weight_of((12, 8))
    with pytest.raises(CalibrationError, match="8 x 8"):
        whitened_svd(weight, 2, torch.eye(12))
    with pytest.raises(CalibrationError, match="zero"):
        whitened_svd(weight, 2, torch.zeros(8, 8))
    with pytest.raises(NonFiniteError):
        whitened_svd(weight, 2, torch.full((8, 8), float("inf")))
    with pytest.raises(CalibrationError, match="needs calibration"):
        factorise(weight, "whitened_svd", 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_error_is_the_tail_of_the_two_sided_singular_values(shape: tuple[int, int]) -> None:
    """Against an SVD of the whitened matrix itself, and the divergence that it stands for."""
    weight, gram, gradients = weight_of(shape).double(), gram_of(shape[1]).double(), gradients_of(shape[0]).double()
    metric = gradients + 0.5 * gradients.diagonal().mean() * torch.eye(shape[0], dtype=torch.float64)
    whitened = torch.linalg.cholesky(metric).T @ weight @ torch.linalg.cholesky(gram)
    for rank in (1, 3, 5):
        tail = torch.linalg.svdvals(whitened)[rank:].square().sum()
        residual = weight - fisher_svd(weight, rank, gram, gradients).product()
        error = torch.trace(metric @ residual @ gram @ residual.T)
        torch.testing.assert_close(error, tail, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0])
def test_fisher_with_equal_output_weights_equals_whitening(shape: tuple[int, int], scale: float) -> None:
    weight, gram = weight_of(shape), gram_of(shape[1])
    found = fisher_svd(weight, 3, gram, scale * torch.eye(shape[0])).product()
    torch.testing.assert_close(found, whitened_svd(weight, 3, gram).product(), atol=1e-4, rtol=1e-3)


def test_fisher_reduces_the_error_of_important_outputs() -> None:
    weight, gram = weight_of((12, 8)), torch.eye(8)
    importance = torch.ones(12)
    importance[4] = 1e6
    residual = weight - fisher_svd(weight, 1, gram, torch.diag(importance)).product()
    alike = weight - whitened_svd(weight, 1, gram).product()
    assert float(residual[4].norm()) < 0.5 * float(alike[4].norm())
    assert float(residual.norm()) > float(alike.norm())


def test_fisher_refuses_invalid_gradient_gram_matrices() -> None:
    weight, gram = weight_of((12, 8)), gram_of(8)
    with pytest.raises(CalibrationError, match="12 x 12"):
        fisher_svd(weight, 2, gram, torch.eye(8))
    with pytest.raises(NonFiniteError, match="gradients"):
        fisher_svd(weight, 2, gram, torch.full((12, 12), float("nan")))
    with pytest.raises(CalibrationError, match="needs gradients"):
        factorise(weight, "fisher_svd", 2, gram)


def test_tucker_equals_tensorly_at_that_rank_and_restores_its_backend() -> None:
    weight = weight_of((12, 8))
    before = tensorly.get_backend()
    factors = tucker(weight, 7).truncated(3)
    assert tensorly.get_backend() == before
    tensorly.set_backend("numpy")
    core, (left, right) = tensorly_tucker(weight.numpy(), rank=[3, 3])
    tensorly.set_backend(before)
    torch.testing.assert_close(factors.product(), torch.from_numpy(left @ core @ right.T), atol=1e-4, rtol=1e-3)


def test_the_tucker_core_is_separate_and_merging_it_keeps_the_product() -> None:
    weight = weight_of((12, 8))
    kept, merged = tucker(weight, 3), tucker_merged(weight, 3)
    assert kept.core is not None
    eye = torch.eye(3)
    torch.testing.assert_close(kept.left.T @ kept.left, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(kept.right @ kept.right.T, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(kept.product(), merged.product(), atol=1e-5, rtol=1e-4)


def test_factors_must_chain() -> None:
    with pytest.raises(ValueError, match="must chain"):
        LowRankFactors(torch.zeros(4, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must chain"):
        LowRankFactors(torch.zeros(4, 2), torch.zeros(2, 5), torch.zeros(3, 3))
