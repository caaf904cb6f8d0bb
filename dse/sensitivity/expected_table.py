"""A sensitivity table without measurements: divergences estimated from gradients and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from dse.cost import parameters_saved
from dse.design_point import WIDTH, DesignPoint, TensorChoice
from dse.errors import AllocationError
from dse.sensitivity.allocation_curves import allocate_curves
from dse.sensitivity.layer_blocks import Block, blocks_of_topology, groups_that_remain
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable, TableOrigin
from dse.topology import Topology

__all__ = ["expected_table"]

_KEPT_FRACTIONS = tuple(round(0.05 * step, 2) for step in range(19, 1, -1))


def expected_table(
    topology: Topology,
    curves: Mapping[str, NDArray[np.float64]],
    *,
    method: str = "fisher_svd",
    form: str = "",
    multiple: int = 1,
    removal: bool = False,
    origin: TableOrigin | None = None,
) -> SensitivityTable:
    """Blocks with their best splits of ranks at kept fractions of 0.95, 0.9, ..., 0.1, and the expected divergences.

    MLPs with a curve over widths can also keep the same fractions of their channels.

    Args:
        curves: Name of a tensor or MLP to expected divergence at each rank or width, from
            `dse.decomposition.expected_divergence`; tensors without a curve stay dense.
        method: Method of the options; the curves are those of `fisher_svd`.
        form: Form of the factors; see `allocate_curves`.
        multiple: Ranks and widths are multiples of this.
        removal: Whether to add the removal of each block. Its divergence is a rough estimate, because the estimates
            assume small changes.
        origin: What the curves were computed from.

    Returns:
        A table whose options are all marked as not measured.
    """
    units = []
    for block in blocks_of_topology(topology, names=frozenset(curves)):
        dense = Option((), block.parameters, 0.0, is_measured=False)
        options = {dense.choices: dense}
        found = [_option(topology, block, curves, kept, method, form, multiple) for kept in _KEPT_FRACTIONS]
        found += _widths(topology, block, curves, multiple)
        for option in found:
            if option is not None:
                options.setdefault(option.choices, option)
        if removal and block.name in topology.blocks_by_name:
            divergence = float(curves[block.tensors[-1].name][0])  # the block's last tensor with an output of zero
            choices = ((block.name, TensorChoice.removal()),)
            options[choices] = Option(choices, 0, divergence, is_measured=False)
        units.append(Unit(block.name, block.layer, block.kind, tuple(options.values())))
    return SensitivityTable(
        tuple(units),
        topology.parameters_dense,
        origin or TableOrigin(methods=(method,)),
        one_remains=groups_that_remain(topology) if removal else (),
    )


def _option(
    topology: Topology,
    block: Block,
    curves: Mapping[str, NDArray[np.float64]],
    kept: float,
    method: str,
    form: str,
    multiple: int,
) -> Option | None:
    """The option of least divergence at a kept fraction of the block; None if no ranks are small enough."""
    reduction = (1 - kept) * block.parameters / topology.parameters_dense
    own = {tensor.name: curves[tensor.name] for tensor in block.tensors}
    try:
        found = allocate_curves(topology, own, reduction, method=method, form=form, multiple=multiple)
    except AllocationError:
        return None
    parameters = block.parameters - parameters_saved(topology, DesignPoint(found.point.choices))
    return Option(found.point.choices, parameters, found.divergence, is_measured=False)


def _widths(
    topology: Topology, block: Block, curves: Mapping[str, NDArray[np.float64]], multiple: int
) -> Iterator[Option]:
    """The widths of the block's MLP at the kept fractions; none without a curve."""
    if block.name not in curves:
        return
    mlp, divergence = topology.mlp(block.name), curves[block.name]
    for kept in _KEPT_FRACTIONS:
        width = max(int(kept * mlp.channels + 1e-9) // multiple * multiple, multiple)
        if width < mlp.channels:
            choices = ((mlp.name, TensorChoice(WIDTH, width)),)
            parameters = block.parameters - parameters_saved(topology, DesignPoint(choices))
            yield Option(choices, parameters, float(divergence[width]), is_measured=False)
