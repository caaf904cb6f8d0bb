"""Apply a design point to a resident model, and undo it exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from dse.cost import pivots_columns, point_problems
from dse.decomposition.block_removal import removal_problems, removal_swaps
from dse.decomposition.expert_surgery import expert_problems, expert_swaps
from dse.decomposition.factors import LowRankFactors
from dse.decomposition.low_rank_modules import (
    LowRankLinear,
    NormThenFactor,
    SharedProduct,
    StackedLinear,
    linear_from,
)
from dse.decomposition.pivoted_factors import pivoted
from dse.decomposition.pivoted_module import PivotedLinear
from dse.decomposition.swaps import Swap, module_swap, weight_problems
from dse.decomposition.width_surgery import width_swaps
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError, RankError
from dse.model_parts import DecomposableTensor, Matrix, TensorStack
from dse.models import LoadedModel
from dse.models.waiting_weights import WaitingWeights
from dse.topology import Topology

__all__ = ["AppliedPoint", "FactorSource", "apply_point", "decompose", "stacked_modules"]


class FactorSource(Protocol):
    """A source of factors: a `FactorBank`, or a test's own implementation."""

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        """Factors of tensor `name` at this method and rank."""
        ...


@runtime_checkable
class PointFactorSource(Protocol):
    """A source whose factors depend on the whole point: a `FactorBank` with a method that refits."""

    def of_point(self, point: DesignPoint) -> FactorSource:
        """The source of this point's factors. The model must be dense during the call."""
        ...


class AppliedPoint:
    """A point that is applied to a model; `undo()` restores the original dense modules."""

    def __init__(self, point: DesignPoint, swaps: list[Swap], waiting: WaitingWeights | None = None) -> None:
        self.point = point
        self._swaps = swaps
        self._waiting = waiting

    @property
    def is_applied(self) -> bool:
        """Whether the model currently holds the low-rank modules rather than the dense ones."""
        return bool(self._swaps) and getattr(self._swaps[0].owner, self._swaps[0].attribute) is self._swaps[0].point

    def use_baseline(self) -> None:
        """Switch to the dense modules. They were never changed, so the weights are bit-identical."""
        if self._waiting is not None:
            self._waiting.release(self._side("point"), kept=self._side("dense"))
            self._waiting.restore(self._side("dense"))
        for swap in self._swaps:
            setattr(swap.owner, swap.attribute, swap.dense)

    def use_candidate(self) -> None:
        """Switch to the low-rank modules."""
        if self._waiting is not None:
            self._waiting.release(self._side("dense"), kept=self._side("point"))
            self._waiting.restore(self._side("point"))
        for swap in self._swaps:
            setattr(swap.owner, swap.attribute, swap.point)

    def add(self, swaps: Sequence[Swap]) -> None:
        """Apply further swaps, which are undone with the point."""
        for swap in swaps:
            setattr(swap.owner, swap.attribute, swap.point)
        self._swaps.extend(swaps)

    def undo(self) -> None:
        """Restore the dense modules permanently and release the factors."""
        self.use_baseline()
        if self._waiting is not None:
            self._waiting.forget(self._side("point"))
        self._swaps.clear()

    def _side(self, side: Literal["dense", "point"]) -> list[nn.Module]:
        return _modules_of(self._swaps, side)


def apply_point(
    model: nn.Module,
    topology: Topology,
    point: DesignPoint,
    source: FactorSource,
    waiting: WaitingWeights | None = None,
) -> AppliedPoint:
    """Replace the tensors of `point` by low-rank modules and remove the blocks that it removes.

    Everything is resolved and checked before anything is replaced. If a factor is missing, nothing has been replaced.

    Args:
        model: The dense model on its device.
        topology: Its topology.
        point: The design point.
        source: Source of the factors, which are moved to the dense weight's device and dtype.
        waiting: Takes the side that is not in use out of the device (`LoadedModel.waiting`).

    Returns:
        A handle that undoes the point.

    Raises:
        PointError: The point does not fit this model, or a tensor is already decomposed; the message lists every
            problem.
        RankError: Same, if ranks above break-even are the only problems.
    """
    problems = point_problems(topology, point)
    behind_norms = _decomposed_behind_norms(model, topology)
    for name, choice in point:
        if choice.is_width and name in topology.mlps_by_name:
            problems += [p for t in topology.mlp(name).tensors for p in _module_problems(model, t, behind_norms)]
        elif name in topology.blocks_by_name:
            problems += removal_problems(model, topology.blocks_by_name[name])
        elif name in topology.experts_by_name:
            problems += expert_problems(model, topology.experts_by_name[name])
        elif name in topology.by_name or name in topology.stacks_by_name:
            problems += [
                p for t in topology.tensors_of(name) for p in _module_problems(model, topology[t], behind_norms)
            ]
    if problems:
        kind = RankError if all(isinstance(problem, RankError) for problem in problems) else PointError
        head = "" if len(problems) == 1 else f"the point has {len(problems)} problems, nothing was changed: "
        raise kind(head + " | ".join(str(problem) for problem in problems))
    if isinstance(source, PointFactorSource):
        source = source.of_point(point)
    swaps: list[Swap] = []
    try:
        for name, choice in point:
            if choice.has_factors and name not in topology.experts_by_name:
                factors = source.factors(name, choice)
                if choice.is_pivoted:
                    swaps.append(_pivoted_swap(model, topology.matrix(name), factors))
                else:
                    swaps += _factor_swaps(model, topology.matrix(name), factors)
                if waiting is not None:  # now, so that the device never holds both sides of the whole point
                    waiting.release(_modules_of(swaps, "dense"), kept=_modules_of(swaps, "point"))
        swaps += [
            *expert_swaps(model, topology, point, source),
            *width_swaps(model, topology, point, source),
            *removal_swaps(model, topology, point.removed),
        ]
        applied = AppliedPoint(point, swaps, waiting)
        applied.use_candidate()
    except BaseException:  # also an interrupt between two swaps, which must not leave half of the point applied
        AppliedPoint(point, swaps, waiting).undo()
        raise
    return applied


@contextlib.contextmanager
def decompose(loaded: LoadedModel, point: DesignPoint, source: FactorSource) -> Iterator[AppliedPoint]:
    """Apply `point` to the model for the duration of a `with` block; it is also undone if the block raises.

    Raises:
        PointError: The point does not fit this model.
    """
    handle = apply_point(loaded.model, loaded.topology, point, source, loaded.waiting)
    try:
        yield handle
    finally:
        handle.undo()


def _modules_of(swaps: Sequence[Swap], side: Literal["dense", "point"]) -> list[nn.Module]:
    """The modules of one side of the swaps."""
    return [module for swap in swaps if isinstance(module := getattr(swap, side), nn.Module)]


def _module_problems(model: nn.Module, tensor: DecomposableTensor, behind_norms: set[str]) -> list[PointError]:
    expected = tensor.shape if tensor.kind == "linear" else tensor.shape[::-1]
    # Behind a norm with a factor, a linear module holds its rows of a stack's left factor.
    linear = (nn.Linear,) if tensor.name in behind_norms else ()
    return weight_problems(
        model, tensor.name, tensor.module, "weight", expected, (LowRankLinear, PivotedLinear, StackedLinear, *linear)
    )


def _decomposed_behind_norms(model: nn.Module, topology: Topology) -> set[str]:
    """Names of the tensors in stacks whose right factor is currently applied together with a norm."""
    applied = {path for path, module in model.named_modules() if isinstance(module, NormThenFactor)}
    return {member.name for stack in topology.stacks if stack.norm in applied for member in stack.members}


def _factor_swaps(model: nn.Module, matrix: Matrix, factors: LowRankFactors) -> Iterator[Swap]:
    """Swap the dense module of a tensor, or of each member of a stack, for its low-rank module.

    If the members of a stack are the only readers of a norm, the norm and the right factor become one module.
    """
    dense = [model.get_submodule(path) for path in matrix.modules]
    weight = dense[0].weight
    assert isinstance(weight, Tensor)  # noqa: S101 - checked by _module_problems
    moved = factors.to(weight.device, weight.dtype)
    biases = [module.bias for module in dense]
    low_rank: tuple[nn.Module, ...]
    if isinstance(matrix, TensorStack) and matrix.norm:
        norm = NormThenFactor(model.get_submodule(matrix.norm), moved.right, moved.core)
        yield module_swap(model, matrix.norm, norm)
        lefts = [moved.left[own].contiguous() for own in matrix.rows]
        low_rank = tuple(starmap(linear_from, zip(lefts, biases, strict=True)))
    elif isinstance(matrix, TensorStack):
        low_rank = stacked_modules(moved, matrix.rows, biases)  # type: ignore[arg-type]  # a module's bias is a tensor
    else:
        low_rank = (LowRankLinear(moved.left, moved.right, biases[0], moved.core),)  # type: ignore[arg-type]
    for path, replacement in zip(matrix.modules, low_rank, strict=True):
        yield module_swap(model, path, replacement)


def _pivoted_swap(model: nn.Module, matrix: Matrix, factors: LowRankFactors) -> Swap:
    """Swap the dense module of a tensor for one that holds its independent columns or rows."""
    (path,) = matrix.modules
    dense = model.get_submodule(path)
    weight, bias = dense.weight, dense.bias
    assert isinstance(weight, Tensor)  # noqa: S101 - checked by _module_problems
    found = pivoted(factors, of_columns=pivots_columns(matrix.role), device=weight.device).to(
        weight.device, weight.dtype
    )
    module = PivotedLinear(
        found.pivots,
        found.combinations,
        found.chosen,
        of_columns=found.of_columns,
        bias=bias,  # type: ignore[arg-type]  # a module's bias is a tensor
    )
    return module_swap(model, path, module)


def stacked_modules(
    factors: LowRankFactors, rows: Sequence[slice], biases: Sequence[Tensor | None]
) -> tuple[StackedLinear, ...]:
    """The low-rank modules of a stack's members, in order, for a stack without a norm of its own.

    Args:
        factors: Factors of the stacked matrix, without the dense members.
        rows: Each member's rows of the left factor.
        biases: Each member's bias.
    """
    shared = SharedProduct(factors.right, factors.core, len(rows))
    return tuple(
        StackedLinear(factors.left[own].contiguous(), bias, shared, i)
        for i, (own, bias) in enumerate(zip(rows, biases, strict=True))
    )
