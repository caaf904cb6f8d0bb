"""Whether what a topology names is in the model at hand, and dense."""

from __future__ import annotations

from torch import Tensor, nn

from dse.errors import PointError

__all__ = ["weight_problems"]


def weight_problems(
    model: nn.Module, name: str, path: str, parameter: str, shape: tuple[int, ...], decomposed: tuple[type, ...]
) -> list[PointError]:
    """What keeps a weight from being decomposed in this very model.

    Args:
        model: The model at hand.
        name: Canonical name, for the message.
        path: Path of its module.
        parameter: Name of its weight in the module.
        shape: That the weight must have.
        decomposed: Types of module that stand in for a dense one.
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
