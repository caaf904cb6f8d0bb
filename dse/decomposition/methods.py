"""Which function serves which method name: a new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dse.decomposition.low_rank import LowRankFactors
from dse.decomposition.truncated_svd import truncated_svd
from dse.decomposition.tucker import tucker, tucker_merged
from dse.decomposition.whitened_svd import whitened_svd
from dse.errors import CalibrationError

__all__ = ["METHODS", "Method", "factorise"]


@dataclass(frozen=True)
class Method:
    """One way to decompose a weight.

    Attributes:
        name: As design points and study files write it.
        function: `(weight, rank)` to factors, or `(weight, rank, gram)` where the method is calibrated.
        is_calibrated: Whether it needs the Gram matrix of calibration activations.
    """

    name: str
    function: Callable[..., LowRankFactors]
    is_calibrated: bool = False


METHODS: Mapping[str, Method] = {
    "tucker": Method("tucker", tucker),
    "tucker_merged": Method("tucker_merged", tucker_merged),
    "svd": Method("svd", truncated_svd),
    "whitened_svd": Method("whitened_svd", whitened_svd, is_calibrated=True),
}


def factorise(weight: Tensor, method: str, rank: int, gram: Tensor | None = None) -> LowRankFactors:
    """Decompose one weight.

    Args:
        weight: Shape (out_features, in_features).
        method: A key of `METHODS`.
        rank: Columns kept.
        gram: Shape (in_features, in_features); needed by calibrated methods, ignored by the others.

    Raises:
        CalibrationError: A calibrated method was asked for without a Gram matrix.
        RankError: `rank` lies outside its interval.
    """
    entry = METHODS[method]
    if not entry.is_calibrated:
        return entry.function(weight, rank)
    if gram is None:
        raise CalibrationError(
            f"method '{method}' needs calibration activations, but none were given; name calibration text"
        )
    return entry.function(weight, rank, gram)
