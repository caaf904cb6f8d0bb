"""Which weights of a point are trained, and their float32 copies while they are.

Trained are the factors, the output matrices of MLPs of reduced width, and the norms. Everything else keeps the dense
model's weights: dense matrices, embeddings, the output head, biases and expert tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dse.decomposition import LowRankLinear, NormThenFactor, PivotedLinear, SharedProduct, StackedLinear
from dse.design_point import DesignPoint
from dse.model_parts import Matrix, TensorStack
from dse.topology import Topology

__all__ = ["CHOSEN", "TrainedWeights", "balance", "chosen_indices", "trained_modules"]

CHOSEN = "chosen"
"""Attribute of a module with pivoted factors: the indices that its weights belong to."""


def trained_modules(model: nn.Module, topology: Topology, point: DesignPoint) -> dict[str, tuple[nn.Module, str]]:
    """The weights to train by their name in the decomposed model: module and attribute.

    Args:
        model: The model with the point applied.
        topology: The dense model's topology.
        point: The point.
    """
    chosen: set[int] = set()
    for name, choice in point:
        if choice.has_factors and name not in topology.experts_by_name:
            for path in topology.matrix(name).modules:
                chosen.update(id(p) for p in model.get_submodule(path).parameters() if p.ndim == 2)
    chosen.update(id(model.get_submodule(topology.mlp(name).output.module).weight) for name in point.widths)
    for module in model.modules():
        if isinstance(module, NormThenFactor):
            chosen.update(id(p) for part in (module.right, module.core) if part is not None for p in part.parameters())
        if "norm" in type(module).__name__.lower():
            chosen.update(id(p) for p in module.parameters(recurse=False) if p.ndim == 1)
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen:
            path, _, attribute = name.rpartition(".")
            found[name] = (model.get_submodule(path), attribute)
    return found


def chosen_indices(model: nn.Module, topology: Topology, point: DesignPoint) -> dict[str, Tensor]:
    """The independent rows or columns of pivoted factors, int64, by the name of their module and `CHOSEN`.

    They are stored with trained weights, since another device or number of threads may choose others.
    """
    paths = [topology.matrix(name).modules[0] for name, choice in point if choice.is_pivoted]
    modules = {path: model.get_submodule(path) for path in paths}
    return {f"{p}.{CHOSEN}": torch.tensor(m.chosen) for p, m in modules.items() if isinstance(m, PivotedLinear)}


class TrainedWeights:
    """Copies of the weights to train in place of the point's own, each with a float32 master for the optimizer.

    A weight that is float32 is its own master. `restore` puts the point's own weights back.
    """

    def __init__(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        self._places = dict(places)
        self._own = {name: getattr(*place) for name, place in places.items()}
        self._live: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        for name, (module, attribute) in self._places.items():
            live = nn.Parameter(self._own[name].detach().clone())
            setattr(module, attribute, live)
            self._live[name] = live
            is_own = live.dtype == torch.float32
            self.masters[name] = live if is_own else nn.Parameter(live.detach().float())

    @property
    def count(self) -> int:
        """Number of parameters that are trained."""
        return sum(master.numel() for master in self.masters.values())

    def gather_gradients(self) -> None:
        """Move the gradients of this step to the masters."""
        for name, live in self._live.items():
            master = self.masters[name]
            if master is not live:
                master.grad = None if live.grad is None else live.grad.float()
                live.grad = None

    def publish(self) -> None:
        """Round the masters to the weights that the model computes with."""
        with torch.no_grad():
            for name, live in self._live.items():
                if self.masters[name] is not live:
                    live.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Copies of the masters on the CPU."""
        return {name: master.detach().to("cpu", copy=True) for name, master in self.masters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the masters and the weights."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state[name])
        self.publish()

    def final(self) -> dict[str, Tensor]:
        """Copies of the weights in the model's dtype, on the CPU."""
        return {name: live.detach().to("cpu", copy=True) for name, live in self._live.items()}

    def restore(self) -> None:
        """Put the point's own weights back, bit-identical."""
        for name, place in self._places.items():
            setattr(*place, self._own[name])


def balance(model: nn.Module, topology: Topology, point: DesignPoint, masters: Mapping[str, nn.Parameter]) -> None:
    """Give each column of a left factor and its row of the right factor the same norm; the product stays.

    Bases of an SVD are orthonormal on one side, so one learning rate would be far too large for one factor or too small
    for the other. Factors with a core are left as they are: both sides are orthonormal. So are pivoted factors, whose
    identity sets the scale.

    Args:
        model: The model with the point applied and the trained weights in place.
        topology: The dense model's topology.
        point: The point.
        masters: The float32 weights by name.
    """
    by_identity = {id(parameter): masters[name] for name, parameter in model.named_parameters() if name in masters}

    def master(linear: Any) -> nn.Parameter:
        return by_identity[id(linear.weight)]

    for name, choice in point:
        if choice.has_factors and name not in topology.experts_by_name:
            right, lefts = _factors(model, topology.matrix(name))
            if right is not None:
                _balance([master(left) for left in lefts], master(right))


def _factors(model: nn.Module, matrix: Matrix) -> tuple[nn.Module | None, list[nn.Module]]:
    """The right factor of one tensor or stack and its left factors; no right factor if they cannot be balanced."""
    modules = [model.get_submodule(path) for path in matrix.modules]
    if isinstance(matrix, TensorStack) and matrix.norm:
        holder, lefts = model.get_submodule(matrix.norm), modules
    else:
        first = modules[0]
        if isinstance(first, PivotedLinear):
            return None, []
        holder = first.shared if isinstance(first, StackedLinear) else first
        lefts = [module.left for module in modules if isinstance(module, StackedLinear | LowRankLinear)]
    assert isinstance(holder, NormThenFactor | SharedProduct | LowRankLinear)  # noqa: S101 - narrows the type
    return (None if holder.core is not None else holder.right), lefts


def _balance(lefts: Sequence[nn.Parameter], right: nn.Parameter) -> None:
    with torch.no_grad():
        columns = torch.stack([left.square().sum(0) for left in lefts]).sum(0).sqrt()
        rows = right.norm(dim=1)
        factor = (rows / columns.clamp(min=1e-30)).sqrt()
        factor = torch.where((columns > 0) & (rows > 0), factor, torch.ones_like(factor))
        for left in lefts:
            left.mul_(factor)
        right.div_(factor[:, None])
