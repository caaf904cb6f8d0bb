"""The layers of a model in order, by path and as modules."""

from __future__ import annotations

from torch import nn

from dse.topology import Topology

__all__ = ["layer_modules", "layer_paths"]


def layer_paths(topology: Topology) -> list[str]:
    """Paths of the layers in order, found through the modules of their tensors."""
    found: dict[int, str] = {}
    for tensor in topology.tensors:
        if tensor.layer is not None and tensor.layer not in found:
            head, _, _ = f".{tensor.module}.".partition(f".{tensor.layer}.")
            found[tensor.layer] = f"{head[1:]}.{tensor.layer}"
    return [found[layer] for layer in sorted(found)]


def layer_modules(model: nn.Module, topology: Topology) -> list[nn.Module]:
    """The layers of a model in order."""
    return [model.get_submodule(path) for path in layer_paths(topology)]
