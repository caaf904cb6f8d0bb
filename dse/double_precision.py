"""Double precision on devices without it: Apple's MPS has none, so float64 work runs on the CPU there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["double_device", "in_double"]

_WITHOUT_FLOAT64 = ("mps",)


def double_device(device: torch.device) -> torch.device:
    """The device for float64 work on tensors of `device`: the same, or the CPU if it has no float64."""
    import torch

    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device or on the CPU if that has no float64; autograd is not supported."""
    import torch

    return tensor.detach().to(double_device(tensor.device)).to(torch.float64)
