"""The swaps that give a model MLPs of reduced width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dse.decomposition.factors import as_matrix
from dse.decomposition.low_rank_modules import linear_from
from dse.decomposition.mlp_width import ChannelFactors
from dse.decomposition.swaps import Swap, module_swap
from dse.design_point import DesignPoint
from dse.errors import PointError
from dse.topology import Topology

__all__ = ["ChannelSource", "kept_rows", "width_swaps"]


@runtime_checkable
class ChannelSource(Protocol):
    """A source that also yields the ordered channels of MLPs."""

    def channels(self, name: str) -> ChannelFactors:
        """The ordered channels of the MLP `name`."""
        ...


def kept_rows(channels: Tensor, width: int, out_features: int) -> Tensor:
    """Rows of an input matrix that produce these channels; a fused gate and up holds every channel twice.

    Args:
        channels: The channels kept, ascending.
        width: Channels of the dense MLP.
        out_features: Rows of the input matrix, a multiple of `width`.
    """
    offsets = range(0, out_features, width)
    return (channels[None] + channels.new_tensor(list(offsets))[:, None]).reshape(-1)


def width_swaps(model: nn.Module, topology: Topology, point: DesignPoint, source: object) -> Iterator[Swap]:
    """The swaps that replace the matrices of each MLP of reduced width by smaller dense ones.

    Args:
        model: The dense model.
        topology: Its topology.
        point: The design point; only its widths are read here.
        source: Source of the ordered channels.

    Raises:
        PointError: The source has no channels.
    """
    if point.widths and not isinstance(source, ChannelSource):
        raise PointError(
            f"the source of factors must hold the channels of MLPs, but {type(source).__name__} has none for"
            f" '{next(iter(point.widths))}'; build a factor bank"
        )
    for name, width in point.widths.items():
        assert isinstance(source, ChannelSource)  # noqa: S101 - checked above
        mlp, factors = topology.mlp(name), source.channels(name)
        kept = factors.kept(width)
        for tensor in mlp.inputs:
            dense = model.get_submodule(tensor.module)
            rows = kept_rows(kept, mlp.channels, tensor.out_features).to(_weight(dense).device)
            bias = dense.bias
            assert bias is None or isinstance(bias, Tensor)  # noqa: S101 - narrows the type
            small = linear_from(as_matrix(dense).detach()[rows], None if bias is None else bias.detach()[rows])
            yield module_swap(model, tensor.module, small)
        dense = model.get_submodule(mlp.output.module)
        matrix = factors.output_matrix(width).to(_weight(dense))
        bias = dense.bias
        assert bias is None or isinstance(bias, nn.Parameter)  # noqa: S101 - narrows the type
        yield module_swap(model, mlp.output.module, linear_from(matrix, bias))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - a linear module
    return weight
