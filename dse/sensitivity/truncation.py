"""Error of a tensor's outputs on a text for every truncation rank, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dse.decomposition.factors import LowRankFactors, as_matrix
from dse.decomposition.surgery import FactorSource
from dse.design_point import TensorChoice
from dse.double_precision import in_double
from dse.models import LoadedModel
from dse.sensitivity.stored_states import full_pass

__all__ = ["truncation_errors"]

_MIN_ERROR = 1e-7  # relative to the output's power: rounding of float32 products


def truncation_errors(
    loaded: LoadedModel, largest: Mapping[str, TensorChoice], source: FactorSource, batches: Sequence[Tensor]
) -> Mapping[str, NDArray[np.float64]]:
    """||W x - L_r R_r x||^2 / ||W x||^2 over a text, for every rank r up to the largest.

    With the activations a = R x of all columns, summed over a text,

        ||W x - L_r a_r||^2 = ||W x||^2 - 2 sum_{i<=r} (L^T W x)_i a_i + sum_{i,j<=r} (L^T L)_ij a_i a_j.

    One pass yields these sums for all ranks, for any method whose factors at lower ranks are the leading columns.

    Args:
        largest: Tensors or stacks to the choice of their largest rank.
        source: Provides their factors.
        batches: Token ids, each of shape (windows, tokens).

    Returns:
        Tensor name to errors at ranks 0 to the largest, in (0, 1], non-increasing; shape (largest + 1,).
    """
    sums = {
        name: _Sums(_modules(loaded, name), *_factors(loaded, source.factors(name, choice)))
        for name, choice in largest.items()
    }
    # The members of a stack read the same input, so a hook on the first suffices.
    handles = [_modules(loaded, name)[0].register_forward_pre_hook(entry.add) for name, entry in sums.items()]
    try:
        for batch in batches:
            full_pass(loaded.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: entry.errors() for name, entry in sums.items()}


class _Sums:
    """Sums over a text for one tensor or stack."""

    def __init__(self, modules: Sequence[nn.Module], left: Tensor, right: Tensor) -> None:
        self._weight = torch.cat([as_matrix(module).float() for module in modules])
        self._left, self._right = left, right
        self._power = 0.0
        self._inner = in_double(torch.zeros(right.shape[0], device=right.device))
        self._activations = in_double(torch.zeros(right.shape[0], right.shape[0], device=right.device))

    def add(self, _module: nn.Module, inputs: Any) -> None:
        """Add the inputs of a batch, shape (..., in_features); a forward pre-hook."""
        x = inputs[0].detach().flatten(0, -2).float()
        outputs, activations = x @ self._weight.T, x @ self._right.T
        self._power += float(outputs.square().sum())
        self._inner += in_double(((outputs @ self._left) * activations).sum(dim=0))
        self._activations += in_double(activations.T @ activations)

    def errors(self) -> NDArray[np.float64]:
        """Relative squared errors at ranks 0 to the largest, shape (largest + 1,)."""
        overlaps = (in_double(self._left.T @ self._left) * self._activations).cpu().numpy()
        # Entry r: what row and column r add to the quadratic form of the leading r columns.
        squares = np.cumsum(2 * np.tril(overlaps, -1).sum(axis=1) + np.diag(overlaps))
        gained = 2 * np.cumsum(self._inner.cpu().numpy()) - squares
        errors = 1.0 - np.concatenate([[0.0], gained]) / max(self._power, 1e-300)
        return np.minimum.accumulate(np.clip(errors, _MIN_ERROR, 1.0))


def _modules(loaded: LoadedModel, name: str) -> list[nn.Module]:
    return [loaded.model.get_submodule(path) for path in loaded.topology.matrix(name).modules]


def _factors(loaded: LoadedModel, factors: LowRankFactors) -> tuple[Tensor, Tensor]:
    left = factors.left if factors.core is None else factors.left @ factors.core
    return left.to(loaded.device).float(), factors.right.to(loaded.device).float()
