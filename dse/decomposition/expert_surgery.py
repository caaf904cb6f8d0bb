"""What is swapped so that a model computes with Tucker-decomposed experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dse.decomposition.expert_factors import TuckerFactors
from dse.decomposition.expert_modules import TuckerExperts, TuckerExpertWeight
from dse.decomposition.module_check import weight_problems
from dse.decomposition.removal import Swap
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError
from dse.expert_tensor import ExpertTensor
from dse.topology import Topology

__all__ = ["ExpertFactorSource", "dense_experts", "expert_problems", "expert_swaps"]


@runtime_checkable
class ExpertFactorSource(Protocol):
    """A source that also yields factors for fused expert tensors."""

    def expert_factors(self, name: str, choice: TensorChoice) -> TuckerFactors:
        """Factors of fused expert tensor `name` at this choice's ranks."""
        ...


def expert_problems(model: nn.Module, tensor: ExpertTensor) -> list[PointError]:
    """What keeps this tensor from being decomposed in this very model."""
    return weight_problems(model, tensor.name, tensor.module, tensor.parameter, tensor.shape, (TuckerExperts,))


def dense_experts(model: nn.Module, tensor: ExpertTensor) -> Tensor:
    """The weight of a fused expert tensor, shape (experts, out_features, in_features).

    Raises:
        PointError: It is not dense now.
    """
    for problem in expert_problems(model, tensor):
        raise problem
    return model.get_submodule(tensor.module).get_parameter(tensor.parameter).detach()


def expert_swaps(model: nn.Module, topology: Topology, point: DesignPoint, source: object) -> Iterator[Swap]:
    """One swap for each module of experts of which the point decomposes one tensor or both.

    Args:
        model: The dense model.
        topology: Its topology.
        point: What to decompose; its matrices and removed blocks are not looked at.
        source: Where factors come from; they are cast to the dense weight's dtype and moved to its device.

    Raises:
        PointError: The source has no factors of fused expert tensors.
    """
    chosen = [topology.experts_by_name[name] for name, _ in point if name in topology.experts_by_name]
    if chosen and not isinstance(source, ExpertFactorSource):
        raise PointError(
            f"the source of factors must have those of fused expert tensors, but {type(source).__name__} has none for"
            f" '{chosen[0].name}'; build a factor bank"
        )
    for path in dict.fromkeys(tensor.module for tensor in chosen):
        dense = model.get_submodule(path)
        weights = []
        for tensor in (tensor for tensor in topology.experts if tensor.module == path):
            weight = dense.get_parameter(tensor.parameter)
            factors = TuckerFactors(weight)
            if tensor.name in point.by_name and isinstance(source, ExpertFactorSource):
                factors = source.expert_factors(tensor.name, point.by_name[tensor.name])
                factors = factors.to(weight.device, weight.dtype)
            weights.append(TuckerExpertWeight(factors))
        parent, _, attribute = path.rpartition(".")
        replacement = TuckerExperts(dense, *weights).train(dense.training)
        yield Swap(model.get_submodule(parent), attribute, dense, replacement)
