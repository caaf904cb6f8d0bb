"""Widths of one MLP against ridge regression, naive elimination, and the divergence computed from its definition."""

from __future__ import annotations

import pytest
import torch
from decomposition_support import gradients_of, gram_of, weight_of

from dse.decomposition.fisher_svd import damped_metric
from dse.decomposition.mlp_width import ChannelFactors, channel_factors
from dse.errors import CalibrationError, NonFiniteError

OUTPUTS, CHANNELS = 10, 40
WEIGHT, GRAM, GRADIENTS = weight_of((OUTPUTS, CHANNELS)), gram_of(CHANNELS), gradients_of(OUTPUTS)


def shrunk(gram: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """C + p diag C, with the small constant that keeps channels without activations invertible."""
    power = gram.double().diagonal()
    return gram.double() + torch.diag(share * power + 1e-6 * power.mean())


def spread_out(factors: ChannelFactors, width: int) -> torch.Tensor:
    """The output matrix of a width with zero columns for the channels that are dropped."""
    matrix = torch.zeros(OUTPUTS, CHANNELS)
    matrix[:, factors.kept(width)] = factors.output_matrix(width)
    return matrix


def test_all_channels_reproduce_the_matrix() -> None:
    factors = channel_factors(WEIGHT, GRAM, GRADIENTS)
    assert factors.kept(CHANNELS).tolist() == list(range(CHANNELS))
    torch.testing.assert_close(factors.output_matrix(CHANNELS), WEIGHT, atol=1e-4, rtol=1e-4)
    assert factors.divergence[-1] == 0


@pytest.mark.parametrize("width", [1, 7, 24, 39])
def test_the_output_matrix_is_the_ridge_solution(width: int) -> None:
    """W' = W C'[:, S] C'[S, S]^-1, computed directly."""
    factors = channel_factors(WEIGHT, GRAM, GRADIENTS)
    covariance, kept = shrunk(GRAM), factors.kept(width)
    expected = WEIGHT.double() @ covariance[:, kept] @ torch.linalg.inv(covariance[kept][:, kept])
    torch.testing.assert_close(factors.output_matrix(width).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gradients", [GRADIENTS, None])
def test_the_expected_divergence_is_half_the_trace(gradients: torch.Tensor | None) -> None:
    """1/2 tr(D E C' E^T) with the error E of each width, and D the identity without gradients."""
    factors = channel_factors(WEIGHT, GRAM, gradients)
    metric = torch.eye(OUTPUTS, dtype=torch.float64)
    if gradients is not None:
        metric = damped_metric(gradients.double()) * gradients.diagonal().mean().double()
    for width in range(1, CHANNELS + 1):
        error = (WEIGHT - spread_out(factors, width)).double()
        expected = 0.5 * float(((metric @ error @ shrunk(GRAM)) * error).sum())
        assert float(factors.divergence[width]) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_dependent_channels_can_be_dropped_at_no_cost() -> None:
    """Channels 5 to 9 are copies of channels 0 to 4: a width of 5 is exact but for the shrinkage."""
    independent = torch.randn(200, 5, generator=torch.Generator().manual_seed(3)).double()
    rows = torch.cat((independent, independent), 1)
    weight = weight_of((OUTPUTS, 10))
    factors = channel_factors(weight, (rows.T @ rows / 200).float())
    kept = factors.kept(5)
    assert sorted(int(channel) % 5 for channel in kept) == [0, 1, 2, 3, 4]
    outputs = rows[:, kept] @ factors.output_matrix(5).double().T
    dense = rows @ weight.double().T
    # Each kept column stands for two equal ones, and the shrinkage of 10 % costs less than that share of the output.
    assert float((outputs - dense).norm() / dense.norm()) < 0.1


def naive_order(weight: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor) -> list[int]:
    """Eliminate one channel at a time; each cost is computed by refitting all that remain."""
    remaining, eliminated = list(range(weight.shape[1])), []

    def cost(kept: list[int]) -> float:
        fitted = weight @ covariance[:, kept] @ torch.linalg.inv(covariance[kept][:, kept])
        error = weight.clone()
        error[:, kept] -= fitted
        return float(((metric @ error @ covariance) * error).sum())

    while len(remaining) > 1:
        cheapest = min(remaining, key=lambda channel: cost([other for other in remaining if other != channel]))
        remaining.remove(cheapest)
        eliminated.append(cheapest)
    return [*remaining, *reversed(eliminated)]


def test_elimination_agrees_with_a_naive_one() -> None:
    """The channels of a small MLP are eliminated one by one."""
    weight, gram, gradients = weight_of((OUTPUTS, 24)), gram_of(24), GRADIENTS
    naive = naive_order(weight.double(), shrunk(gram), damped_metric(gradients.double()))
    assert channel_factors(weight, gram, gradients).channels.tolist() == naive


def test_elimination_in_blocks_is_almost_as_good_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = weight_of((OUTPUTS, 160)), gram_of(160)
    singly = channel_factors(weight, gram, GRADIENTS).divergence[10:-10]
    monkeypatch.setattr("dse.decomposition.mlp_width._ELIMINATED_TOGETHER", 0.1)
    in_blocks = channel_factors(weight, gram, GRADIENTS).divergence[10:-10]
    assert (in_blocks <= 1.1 * singly).all()
    assert not torch.equal(in_blocks, singly)


def test_channel_sets_are_nested_and_the_divergence_falls() -> None:
    factors = channel_factors(WEIGHT, GRAM, GRADIENTS)
    for width in range(1, CHANNELS):
        assert set(factors.kept(width).tolist()) < set(factors.kept(width + 1).tolist())
    assert (factors.divergence.diff() <= 0).all()
    assert factors.divergence.shape == (CHANNELS + 1,)


def test_channels_without_activations_are_eliminated_first() -> None:
    gram = GRAM.clone()
    dead = [3, 17, 30]
    gram[dead], gram[:, dead] = 0, 0
    factors = channel_factors(WEIGHT, gram, GRADIENTS)
    assert not set(dead) & set(factors.kept(CHANNELS - 16).tolist())
    assert torch.isfinite(factors.output_matrix(CHANNELS - 3)).all()


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(CalibrationError, match="Gram"):
        channel_factors(WEIGHT, gram_of(CHANNELS - 1), GRADIENTS)
    with pytest.raises(CalibrationError, match="all"):
        channel_factors(WEIGHT, torch.zeros_like(GRAM), GRADIENTS)
    with pytest.raises(NonFiniteError):
        channel_factors(WEIGHT * float("nan"), GRAM, GRADIENTS)
