"""Put a design point into a resident model, and take it out again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from dse.cost import point_problems
from dse.decomposition.expert_surgery import expert_problems, expert_swaps
from dse.decomposition.low_rank import LowRankFactors, LowRankLinear
from dse.decomposition.module_check import weight_problems
from dse.decomposition.removal import Swap, removal_problems, removal_swaps
from dse.decomposition.stacked import StackedLinear, stacked_modules
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError, RankError
from dse.models import LoadedModel
from dse.topology import DecomposableTensor, Matrix, TensorStack, Topology

__all__ = ["AppliedPoint", "FactorSource", "apply_point", "decompose"]


class FactorSource(Protocol):
    """Anything that yields factors for a tensor: a `FactorBank`, or a test's own."""

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        """Factors of tensor `name` at this method and rank."""
        ...


@runtime_checkable
class PointFactorSource(Protocol):
    """A source whose factors depend on the whole point: a `FactorBank`, where methods refit."""

    def of_point(self, point: DesignPoint) -> FactorSource:
        """Where the factors of this point come from; the model is dense while it is asked."""
        ...


class AppliedPoint:
    """A point that is in the model now; `undo()` puts the very same dense modules back."""

    def __init__(self, point: DesignPoint) -> None:
        self.point = point
        self._swaps: list[Swap] = []

    @property
    def is_applied(self) -> bool:
        """Whether the factors are in the model rather than the dense modules."""
        return bool(self._swaps) and getattr(self._swaps[0].owner, self._swaps[0].attribute) is self._swaps[0].point

    def use_baseline(self) -> None:
        """Put the dense modules in; they were never altered, so the weights are bit-identical."""
        for swap in self._swaps:
            setattr(swap.owner, swap.attribute, swap.dense)

    def use_candidate(self) -> None:
        """Put the low-rank modules in again."""
        for swap in self._swaps:
            setattr(swap.owner, swap.attribute, swap.point)

    def undo(self) -> None:
        """Restore the dense modules for good and let the factors go."""
        self.use_baseline()
        self._swaps.clear()

    def _add(self, swap: Swap) -> None:
        self._swaps.append(swap)


def apply_point(model: nn.Module, topology: Topology, point: DesignPoint, source: FactorSource) -> AppliedPoint:
    """Replace the tensors that `point` names by low-rank modules, and take out the blocks that it removes.

    All is resolved and checked before anything is replaced; if a factor cannot be had half-way, nothing was replaced.

    Args:
        model: The dense model, resident on its device.
        topology: Its topology.
        point: What to decompose.
        source: Where factors come from; they are cast to the dense weight's dtype and moved to its device.

    Returns:
        The handle that undoes it.

    Raises:
        PointError: The point does not fit this model, or a tensor is already decomposed; every problem is listed.
        RankError: As above, where ranks above break-even are the only problems.
    """
    problems = point_problems(topology, point)
    for name, _ in point:
        if name in topology.blocks_by_name:
            problems += removal_problems(model, topology.blocks_by_name[name])
        elif name in topology.experts_by_name:
            problems += expert_problems(model, topology.experts_by_name[name])
        elif name in topology.by_name or name in topology.stacks_by_name:
            problems += [p for tensor in topology.tensors_of(name) for p in _module_problems(model, topology[tensor])]
    if problems:
        kind = RankError if all(isinstance(problem, RankError) for problem in problems) else PointError
        head = "" if len(problems) == 1 else f"{len(problems)} problems with this point, nothing was changed: "
        raise kind(head + " | ".join(str(problem) for problem in problems))
    if isinstance(source, PointFactorSource):
        source = source.of_point(point)
    applied = AppliedPoint(point)
    for name, choice in point:
        if not choice.is_removal and name not in topology.experts_by_name:
            for swap in _factor_swaps(model, topology.matrix(name), source.factors(name, choice)):
                applied._add(swap)
    for swap in (*expert_swaps(model, topology, point, source), *removal_swaps(model, topology, point.removed)):
        applied._add(swap)
    try:
        applied.use_candidate()
    except BaseException:  # an interrupt between two swaps must not leave half a point in the model
        applied.undo()
        raise
    return applied


@contextlib.contextmanager
def decompose(loaded: LoadedModel, point: DesignPoint, source: FactorSource) -> Iterator[AppliedPoint]:
    """Have `point` in the model for the length of a `with` block; it is undone also when the block raises.

    Raises:
        PointError: The point does not fit this model.
    """
    handle = apply_point(loaded.model, loaded.topology, point, source)
    try:
        yield handle
    finally:
        handle.undo()


def _module_problems(model: nn.Module, tensor: DecomposableTensor) -> list[PointError]:
    expected = tensor.shape if tensor.kind == "linear" else tensor.shape[::-1]
    return weight_problems(model, tensor.name, tensor.module, "weight", expected, (LowRankLinear, StackedLinear))


def _factor_swaps(model: nn.Module, matrix: Matrix, factors: LowRankFactors) -> Iterator[Swap]:
    """The low-rank module of a tensor, or of each member of a stack, in place of the dense one."""
    dense = [model.get_submodule(path) for path in matrix.modules]
    weight = dense[0].weight
    assert isinstance(weight, torch.Tensor)  # noqa: S101 - checked by _module_problems
    moved = factors.to(weight.device, weight.dtype)
    biases = [module.bias for module in dense]
    low_rank: tuple[nn.Module, ...]
    if isinstance(matrix, TensorStack):
        low_rank = stacked_modules(moved, matrix.rows, biases)  # type: ignore[arg-type]  # a module's bias is a tensor
    else:
        low_rank = (LowRankLinear(moved.left, moved.right, biases[0], moved.core),)  # type: ignore[arg-type]
    for path, module, replacement in zip(matrix.modules, dense, low_rank, strict=True):
        parent, _, attribute = path.rpartition(".")
        yield Swap(model.get_submodule(parent), attribute, module, replacement.train(module.training))
