"""The swaps that give a model Tucker-decomposed experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dse.decomposition.expert_modules import TuckerExperts, TuckerExpertWeight
from dse.decomposition.factors import TuckerFactors
from dse.decomposition.swaps import Swap, module_swap, weight_problems
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError
from dse.expert_tensor import ExpertTensor
from dse.topology import Topology

__all__ = ["ExpertFactorSource", "dense_experts", "expert_problems", "expert_swaps"]


@runtime_checkable
class ExpertFactorSource(Protocol):
    """A source that also yields factors of fused expert tensors."""

    def expert_factors(self, name: str, choice: TensorChoice) -> TuckerFactors:
        """Factors of fused expert tensor `name` at the ranks of this choice."""
        ...


def expert_problems(model: nn.Module, tensor: ExpertTensor) -> list[PointError]:
    """Reasons why this tensor cannot be decomposed in this model; empty if it can."""
    return weight_problems(model, tensor.name, tensor.module, tensor.parameter, tensor.shape, (TuckerExperts,))


def dense_experts(model: nn.Module, tensor: ExpertTensor) -> Tensor:
    """The weight of a fused expert tensor, shape (experts, out_features, in_features).

    Raises:
        PointError: It is not dense.
    """
    for problem in expert_problems(model, tensor):
        raise problem
    return model.get_submodule(tensor.module).get_parameter(tensor.parameter).detach()


def expert_swaps(model: nn.Module, topology: Topology, point: DesignPoint, source: object) -> Iterator[Swap]:
    """One swap for each module of experts in which the point decomposes at least one tensor.

    Args:
        model: The dense model.
        topology: Its topology.
        point: The design point; its matrices and removed blocks are ignored here.
        source: Source of the factors, which are moved to the dense weight's device and dtype.

    Raises:
        PointError: The source has no factors of fused expert tensors.
    """
    chosen = [topology.experts_by_name[name] for name, _ in point if name in topology.experts_by_name]
    if chosen and not isinstance(source, ExpertFactorSource):
        raise PointError(
            f"the source of factors must hold those of fused expert tensors, but {type(source).__name__} has none for"
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
            weights.append(TuckerExpertWeight(**vars(factors)))
        yield module_swap(model, path, TuckerExperts(dense, *weights))
