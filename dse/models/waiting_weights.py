"""Weights of modules that are not in use, outside their device: in host memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from dse.files import cache_dir
from dse.models.tensor_store import StoreBudget, TensorStore

__all__ = ["WaitingWeights"]


class WaitingWeights:
    """Weights of modules that are not in use, outside their device.

    A waiting parameter keeps its shape but no memory. Its bytes are kept once, so a dense weight that leaves the device
    again is not copied again, and comes back bit-identical.

    Args:
        host_bytes: Host memory for weights of a GPU; the rest, and all weights of a CPU, go to disk.
        folder: Where they go; None for the user's cache.
    """

    def __init__(self, host_bytes: int, folder: Path | None = None) -> None:
        self._store = TensorStore(StoreBudget(0, host_bytes), folder or cache_dir())
        self._parameters: dict[int, nn.Parameter] = {}
        self._away: dict[int, torch.device] = {}

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Bytes in host memory and on disk."""
        return self._store.bytes_by_place

    @torch.inference_mode(False)  # weights stay ordinary tensors, also if a measurement moves them
    def release(self, modules: Iterable[nn.Module], kept: Iterable[nn.Module] = ()) -> None:
        """Move the weights of `modules` out of their device, except those that `kept` modules hold as well."""
        shared = {id(parameter) for module in kept for parameter in module.parameters()}
        for module in modules:
            for parameter in module.parameters():
                key = id(parameter)
                if key in shared or key in self._away:
                    continue
                if key not in self._parameters:
                    self._parameters[key] = parameter  # keeps it alive, so that its id is not reused
                    self._store.put(key, parameter.data)
                self._away[key] = parameter.device
                parameter.data = _without_memory(parameter.data)

    @torch.inference_mode(False)
    def restore(self, modules: Iterable[nn.Module]) -> None:
        """Bring the weights of `modules` back to their device."""
        for module in modules:
            for parameter in module.parameters():
                device = self._away.pop(id(parameter), None)
                if device is not None:
                    parameter.data = self._store.get(id(parameter), device)

    def forget(self, modules: Iterable[nn.Module]) -> None:
        """Drop what is kept of modules that are not used any more."""
        for module in modules:
            for parameter in module.parameters():
                self._away.pop(id(parameter), None)
                if self._parameters.pop(id(parameter), None) is not None:
                    self._store.drop(id(parameter))


def _without_memory(weight: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that holds a single number."""
    return torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
