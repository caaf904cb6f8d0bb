"""Run a module without its matrices: what is left of it are norms and wiring, which is what the topology asks about."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["run_skeleton", "skeleton_of"]


def skeleton_of(layer: nn.Module, stubs: Mapping[str, nn.Module], generator: torch.Generator) -> nn.Module:
    """A copy of a module on the CPU in which stubs stand for some children; what else it holds gets random weights.

    Args:
        layer: The module, on any device, the meta device included; it is not changed.
        stubs: Child name to stub: every child that holds matrices.
        generator: Of the random weights.
    """
    skeleton = copy.copy(layer)
    vars(skeleton).pop("forward", None)  # libraries that place layers on devices put one there
    others = {name: child for name, child in layer.named_children() if name not in stubs}
    copies = {name: copy.deepcopy(child).to_empty(device="cpu").float().eval() for name, child in others.items()}
    skeleton._modules = {name: stubs.get(name) or copies.get(name) for name in layer._modules}
    skeleton._parameters = {
        name: None if p is None else nn.Parameter(torch.empty(p.shape), requires_grad=False)
        for name, p in layer._parameters.items()
    }
    skeleton.training = False
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return skeleton


def run_skeleton(skeleton: nn.Module, hidden: Tensor) -> object | None:
    """Its output, or None where it cannot be run with these stubs; they need no mask, position or cache."""
    forward = type(skeleton).forward
    needed = [
        p.name
        for p in list(inspect.signature(forward).parameters.values())[2:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    try:
        with torch.no_grad():
            output: object = forward(skeleton, hidden, **dict.fromkeys(needed))
    except Exception:  # noqa: BLE001 - whatever a layer raises here means that it does not take blocks of this form
        return None
    return output
