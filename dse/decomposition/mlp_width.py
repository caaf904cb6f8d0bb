"""`width`: an MLP that keeps its most useful channels, with the output matrix refitted to them.

Let h be the intermediate activations of an MLP, C = E[h h^T], and W the output matrix (down). Keeping the channels S
replaces W h by W' h_S with

    W' = W C'[:, S] (C'[S, S])^-1,    C' = C + p diag(C):

ridge regression that shrinks towards the old columns (a Nystroem approximation of C'). The rows of the input matrices
stay as they are. The result is a dense MLP with smaller matrices, which every engine runs at full speed.

Channels are eliminated backwards: always those whose loss costs least after all others are refitted (as weights in
optimal brain surgeon, Hassibi and Stork 1993). To second order an error E h in the output costs the model a divergence
of 1/2 tr(D E C E^T) nats per token, with D the mean of g g^T over the gradients g of the loss with respect to the
output, as in `dse.decomposition.fisher_svd`.

The channel sets are nested. With channels in order of usefulness, C' = L L^T and M = W L, the refitted matrix of the
first k channels is W' = M[:, :k] L[:k, :k]^-1, and its squared error in the metrics of C' and D is the sum of
m_j^T D m_j over the other columns of M. So one Cholesky factor serves all widths.

The expected divergence is that in C', not in C: as many regressors as channels fit the calibration tokens too well, and
in C it would be 1.5 to 2 times below that of other tokens. The shrinkage makes it as optimistic as that of low-rank
factors (docs/figures.md), so that an allocation can compare the two.

Source: MoDeGPT (Lin et al., arXiv 2408.09632), section 3.2, for the Nystroem approximation of an MLP; its channels come
from ridge leverage scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dse.decomposition.fisher_svd import damped_metric
from dse.decomposition.input_checks import check_gradient_gram, check_gram, check_rank
from dse.double_precision import in_double

__all__ = ["ChannelFactors", "channel_factors"]

_SHRINKAGE = 0.1
"""Share p of each channel's power that is added to C. Larger values shrink more towards the old columns."""

_DEAD_CHANNEL = 1e-6
"""A channel without activations counts with this share of the mean power, so that C' is invertible."""

_ELIMINATED_TOGETHER = 1 / 96
"""Most channels eliminated in one step, as a share of all; between steps the others are refitted."""

_ELIMINATED_OF_REST = 1 / 16
"""Most channels eliminated in one step, as a share of those that remain, at least one."""

_COMPACTED_AT = 0.7
"""Share of channels left at which matrices are copied without the eliminated ones. Copying in every step costs more."""


@dataclass(frozen=True)
class ChannelFactors:
    """What every width of one MLP is computed from.

    Attributes:
        channels: All channels, the most useful first, shape (I,), int64.
        root: Lower Cholesky factor L of C' in this order, shape (I, I), float32.
        outputs: M = W L, shape (O, I), float32.
        divergence: Expected divergence in nats per token with the first k channels, k = 0 ... I, shape (I + 1,),
            float64; 0 at the end. All zero if no gradient reaches the MLP.
    """

    channels: Tensor
    root: Tensor
    outputs: Tensor
    divergence: Tensor

    def kept(self, width: int) -> Tensor:
        """The channels of this width, ascending, shape (width,)."""
        return self.channels[:width].sort().values

    def output_matrix(self, width: int) -> Tensor:
        """The refitted output matrix for `kept(width)`, shape (O, width), float32."""
        root = in_double(self.root[:width, :width])
        left = in_double(self.outputs[:, :width])
        # X L = M  <=>  L^T X^T = M^T
        solved: Tensor = torch.linalg.solve_triangular(root.T, left.T, upper=True).T
        return solved[:, self.channels[:width].argsort()].to(torch.float32).contiguous()


def channel_factors(weight: Tensor, gram: Tensor, gradient_gram: Tensor | None = None) -> ChannelFactors:
    """Order the channels of an MLP, and factorise what every width needs.

    Args:
        weight: The output matrix, shape (O, I), floating point.
        gram: Mean of h h^T over calibration tokens, shape (I, I).
        gradient_gram: Mean of g g^T over calibration tokens, shape (O, O); None lets all outputs count alike, and the
            divergence is then half the mean squared error of the output.

    Raises:
        NonFiniteError: The weight or a Gram matrix holds NaN or infinity.
        CalibrationError: A Gram matrix has another size, or all activations are zero.
    """
    outputs, size = weight.shape
    check_rank(weight, 1)
    check_gram(gram, size)
    moments = in_double(gram)
    power = moments.diagonal()
    covariance = moments + torch.diag(_SHRINKAGE * power + _DEAD_CHANNEL * power.mean())
    wide = in_double(weight)
    metric, scale = torch.eye(outputs, dtype=torch.float64, device=wide.device), 1.0
    if gradient_gram is not None:
        check_gradient_gram(gradient_gram, outputs)
        metric, scale = damped_metric(in_double(gradient_gram)), float(gradient_gram.diagonal().mean())
    order = _backward_elimination(wide, covariance, metric)
    root = torch.linalg.cholesky(covariance[order][:, order])
    columns = wide[:, order] @ root
    lost = ((metric @ columns) * columns).sum(0)
    left_out = torch.cat((lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)))
    return ChannelFactors(
        order.cpu(), root.to("cpu", torch.float32), columns.to("cpu", torch.float32), (0.5 * scale * left_out).cpu()
    )


def _backward_elimination(weight: Tensor, covariance: Tensor, metric: Tensor) -> Tensor:
    """All channels, the last to be eliminated first.

    Eliminating channel j and refitting the others costs w_j^T D w_j / [C'^-1]_jj. The weight and the inverse are
    updated by blocks, as of a Schur complement.
    """
    size = weight.shape[1]
    remaining, is_left = torch.arange(size, device=weight.device), torch.ones(size, dtype=torch.bool)
    weight, weighted = weight.clone(), metric @ weight  # both kept up to date; a product in every step would cost more
    inverse = torch.linalg.inv(covariance)
    eliminated: list[Tensor] = []
    for count in _steps(size):
        costs = (weighted * weight).sum(0) / inverse.diagonal()
        cheapest = costs.masked_fill(~is_left.to(costs.device), torch.inf).topk(count, largest=False).indices
        cheapest = cheapest[costs[cheapest].argsort()]
        rows = inverse[cheapest]
        step = torch.linalg.solve(rows[:, cheapest], rows)
        for matrix, columns in ((weight, weight[:, cheapest]), (weighted, weighted[:, cheapest]), (inverse, rows.T)):
            matrix.addmm_(columns, step, alpha=-1)  # leaves zeros in the columns of the eliminated channels
        eliminated.append(remaining[cheapest])
        is_left[cheapest.cpu()] = False
        if is_left.sum() <= _COMPACTED_AT * len(is_left):
            stays = is_left.nonzero()[:, 0].to(weight.device)
            weight, weighted, remaining = weight[:, stays], weighted[:, stays], remaining[stays]
            inverse, is_left = inverse[stays][:, stays], is_left[is_left]
    return torch.cat(eliminated).flip(0)


def _steps(size: int) -> Iterator[int]:
    """Numbers of channels that are eliminated together, step by step."""
    left = size
    while left:
        count = max(1, int(min(_ELIMINATED_TOGETHER * size, _ELIMINATED_OF_REST * left)))
        yield count
        left -= count
