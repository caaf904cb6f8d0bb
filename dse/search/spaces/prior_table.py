"""Sensitivity tables of a space before measurements: prior divergences computed from the options' sizes."""

from __future__ import annotations

import itertools

from dse.config import SearchSpaceConfig
from dse.cost import factor_parameters, parameters_saved
from dse.design_point import WIDTH, DesignPoint, TensorChoice
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.rank_levels import choice_at, level_count, width_levels
from dse.sensitivity.layer_blocks import Block, blocks_of_topology, groups_that_remain
from dse.sensitivity.option import Choices, Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology

__all__ = ["block_table", "level_table"]


def _option(choices: Choices, saved: int, dense: int) -> Option:
    """An option with its prior divergence: the square of its unit's share of parameters that it removes."""
    return Option(choices, dense - saved, (saved / dense) ** 2, is_measured=False)


def level_table(space: LevelSpace, method: str) -> SensitivityTable:
    """The groups of a space as units, and their levels under one method as options."""
    units = []
    for group in space.groups:
        # Norms are removed with a block, so its dense parameters are those of the matrices and the norms.
        dense = sum(part.parameters for part in (group.blocks or group.matrices))
        options = [Option((), dense, 0.0)]
        for level in group.levels(method):
            choices, saved = tuple(group.choices(method, level).items()), group.saved(method, level)
            options.append(_option(choices, saved, dense))
        layers = [matrix.layer for matrix in group.matrices if matrix.layer is not None]
        layer = layers[len(layers) // 2] if layers else None
        units.append(Unit(group.name, layer, group.label or "block", tuple(options)))
    return SensitivityTable(tuple(units), space.topology.parameters_dense)


def block_table(config: SearchSpaceConfig, topology: Topology) -> SensitivityTable:
    """The attention and MLP blocks as units, with the space's kept fractions, widths and removal as options."""
    units = tuple(_unit(config, topology, block) for block in blocks_of_topology(topology))
    remaining = groups_that_remain(topology) if config.removal else ()
    return SensitivityTable(units, topology.parameters_dense, one_remains=remaining)


def _unit(config: SearchSpaceConfig, topology: Topology, block: Block) -> Unit:
    tensors = block.tensors
    removable = topology.blocks_by_name.get(block.name) if config.removal else None
    # Norms are removed with a block, so its dense parameters are those of the matrices and the norms.
    dense = sum(t.parameters for t in tensors) if removable is None else removable.parameters
    options: dict[Choices, Option] = {(): Option((), dense, 0.0)}
    for method, form in itertools.product(config.methods, config.factor_forms):
        for index in range(level_count(config.ranks)):
            choices = tuple(sorted((t.name, choice_at(config.ranks, index, t, method, form)) for t in tensors))
            saved = sum(t.parameters - factor_parameters(t, dict(choices)[t.name]) for t in tensors)
            if saved > 0:
                options.setdefault(choices, _option(choices, saved, dense))
    if config.widths and (mlp := topology.mlps_by_name.get(block.name)) is not None:
        for kept in width_levels(config.ranks, mlp):
            narrow = ((mlp.name, TensorChoice(WIDTH, kept)),)
            options[narrow] = _option(narrow, parameters_saved(topology, DesignPoint(narrow)), dense)
    if removable is not None:
        gone = ((block.name, TensorChoice.removal()),)
        saved = parameters_saved(topology, DesignPoint(gone))
        options[gone] = _option(gone, saved, dense)
    return Unit(block.name, block.layer, block.kind, tuple(options.values()))
