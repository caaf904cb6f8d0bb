"""Method name to the function that implements it. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dse.decomposition.factors import LowRankFactors
from dse.decomposition.fisher_svd import fisher_svd
from dse.decomposition.mlp_width import channel_factors
from dse.decomposition.svd_methods import truncated_svd, whitened_svd
from dse.decomposition.tucker import tucker, tucker_merged
from dse.design_point import WIDTH
from dse.errors import CalibrationError

__all__ = ["METHODS", "Method", "factorise"]


@dataclass(frozen=True)
class Method:
    """One decomposition method.

    Attributes:
        function: `(weight, rank)` to factors; `(weight, rank, gram)` for a calibrated method; `(weight, rank, gram,
            gradient_gram)` for a method that also uses gradients. For `width`, `channel_factors`, which serves all
            widths of an MLP.
        is_calibrated: Whether it needs the Gram matrix of calibration activations.
        needs_gradients: Whether it also needs the Gram matrix of output gradients.
        refit_of: For a method that refits left factors to the whole point (`dse.decomposition.refit`), the method whose
            factors it starts from; a bank stores the factors under that name. Empty for methods that decompose each
            tensor separately.
    """

    function: Callable[..., Any]
    is_calibrated: bool = False
    needs_gradients: bool = False
    refit_of: str = ""


METHODS: Mapping[str, Method] = {
    "tucker": Method(tucker),
    "tucker_merged": Method(tucker_merged),
    "svd": Method(truncated_svd),
    "whitened_svd": Method(whitened_svd, is_calibrated=True),
    "fisher_svd": Method(fisher_svd, is_calibrated=True, needs_gradients=True),
    "fisher_svd_refit": Method(fisher_svd, is_calibrated=True, needs_gradients=True, refit_of="fisher_svd"),
    WIDTH: Method(channel_factors, is_calibrated=True, needs_gradients=True),
}


def factorise(
    weight: Tensor, method: str, rank: int, gram: Tensor | None = None, gradient_gram: Tensor | None = None
) -> LowRankFactors:
    """Decompose one weight.

    Args:
        weight: Shape (out_features, in_features).
        method: A key of `METHODS`.
        rank: Columns kept.
        gram: Shape (in_features, in_features). Required by calibrated methods, ignored by the others.
        gradient_gram: Shape (out_features, out_features). Required by methods that use gradients.

    Raises:
        CalibrationError: The method needs a Gram matrix that is missing.
        RankError: `rank` lies outside its interval.
    """
    entry = METHODS[method]
    factors: LowRankFactors
    if not entry.is_calibrated:
        factors = entry.function(weight, rank)
        return factors
    if gram is None:
        raise CalibrationError(
            f"method '{method}' needs calibration activations, but none were given; name calibration text"
        )
    if not entry.needs_gradients:
        factors = entry.function(weight, rank, gram)
        return factors
    if gradient_gram is None:
        raise CalibrationError(f"method '{method}' needs gradients on calibration text, but none were given")
    factors = entry.function(weight, rank, gram, gradient_gram)
    return factors
