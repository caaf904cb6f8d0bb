"""Products of many rows by oneDNN, which torch carries beside the library that it multiplies float32 by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_onednn", "linear_by_onednn"]

# An operator of our own: torch.compile refuses to trace torch's.
_LIBRARY = torch.library.Library("dse", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear_by_onednn(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can multiply tensors of this kind so, and would not do it anyway."""
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return (
        is_built and hasattr(torch.ops.mkldnn, "_linear_pointwise") and device.type == "cpu" and dtype == torch.float32
    )


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`; no gradients.

    Args:
        x: Shape (..., in_features).
        weight: Shape (out_features, in_features).
        bias: Shape (out_features,), or None.

    Returns:
        Shape (..., out_features).
    """
    found: Tensor = torch.ops.dse.linear_by_onednn(x, weight, bias)
    return found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _shape(x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("linear_by_onednn", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("dse::linear_by_onednn", _shape, lib=_LIBRARY)
