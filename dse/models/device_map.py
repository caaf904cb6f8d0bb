"""Spread a model over several devices: whole layers in order, each device holding about its share of the bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dse.errors import ModelError

__all__ = ["device_map", "spread_over"]


def device_map(model: nn.Module, devices: Sequence[torch.device]) -> Mapping[str, torch.device]:
    """Assign modules to devices.

    Args:
        model: A Hugging Face model.
        devices: Two or more distinct devices.

    Returns:
        Module path to device; a layer is never split.

    Raises:
        ModelError: The model has too few layers for this many devices.
    """
    from accelerate import infer_auto_device_map

    whole: Any = getattr(model, "_no_split_modules", None) or []
    total_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    share = total_bytes / len(devices)
    # Layers do not divide evenly, so increase the limit per device until the whole model is placed.
    for slack in (1.05, 1.15, 1.3, 1.6, 2.0):
        limits: dict[int | str, int] = {index: math.ceil(slack * share) for index in range(len(devices))}
        found = infer_auto_device_map(model, max_memory={**limits, "cpu": 0}, no_split_module_classes=list(whole))
        used = {place for place in found.values() if isinstance(place, int)}
        if all(isinstance(place, int) for place in found.values()) and len(used) == len(devices):
            return {name: devices[place] for name, place in found.items()}
    raise ModelError(
        f"a model must have layers for each of {len(devices)} devices, but {type(model).__name__} cannot be spread"
        f" over {', '.join(map(str, devices))}; name fewer devices"
    )


def spread_over(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Move the model's layers to `devices`; activations follow them.

    Raises:
        ModelError: The model has too few layers.
    """
    from accelerate import dispatch_model

    dispatch_model(model, dict(device_map(model, devices)))
