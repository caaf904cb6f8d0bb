"""Swaps of modules in a model, and the check that a weight is present and dense before it is swapped."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from dse.errors import PointError

__all__ = ["Swap", "module_swap", "weight_problems"]


class Swap(NamedTuple):
    """One attribute of one module that differs between the dense model and the point.

    Attributes:
        owner: The module that has the attribute.
        attribute: Name of the attribute; an index inside a list of modules.
        dense: Its value in the dense model.
        point: Its value while the point is applied.
    """

    owner: nn.Module
    attribute: str
    dense: Any
    point: Any


def module_swap(model: nn.Module, path: str, replacement: nn.Module) -> Swap:
    """Swap the module at `path` for `replacement`, which takes over its training mode."""
    parent, _, attribute = path.rpartition(".")
    dense = model.get_submodule(path)
    return Swap(model.get_submodule(parent), attribute, dense, replacement.train(dense.training))


def weight_problems(
    model: nn.Module, name: str, path: str, parameter: str, shape: tuple[int, ...], decomposed: tuple[type, ...]
) -> list[PointError]:
    """Reasons why a weight cannot be decomposed in this model; empty if it can.

    Args:
        model: The model.
        name: Canonical name of the weight, for the message.
        path: Path of its module.
        parameter: Name of the weight in the module.
        shape: Expected shape of the weight.
        decomposed: Module types that stand for a decomposed weight.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return [PointError(f"the model must have the module '{path}' ('{name}'), but it has none: another model?")]
    if isinstance(module, decomposed):
        return [
            PointError(f"'{name}' must be dense before a point is applied, but it is decomposed already; undo first")
        ]
    weight = getattr(module, parameter, None)
    found = tuple(weight.shape) if isinstance(weight, Tensor) else None
    if found != shape:
        return [PointError(f"'{name}' must have a weight of shape {shape}, but the model's is {found}: another model?")]
    return []
