"""`kind: depth_profile`: a budget and weights over depth, turned into a point by exact allocation."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from dse.config import SearchSpaceConfig
from dse.cost import largest_rank, point_cost
from dse.design_point import REMOVED, WIDTH, DesignPoint, TensorChoice
from dse.errors import AllocationError, ConfigError, PointError
from dse.search.spaces.base import SearchSpace, outside_space
from dse.search.spaces.prior_table import block_table
from dse.search.spaces.table_space import TableSpace, constraints_of
from dse.sensitivity.allocation import allocate
from dse.sensitivity.allocation_constraints import AllocationConstraints
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology

__all__ = ["RESOLUTION", "DepthProfileSpace"]

RESOLUTION = 101
"""Levels of each continuous parameter; a step is far below what an evaluation can distinguish."""

_BUDGET, _METHOD, _REMOVAL, _WIDTH, _EVENNESS = "budget", "method", "removal", "width", "evenness"
_MIDDLE = (RESOLUTION - 1) // 2
_MAX_OCTAVES = 3.0  # divergences are weighted by factors from 1/8 to 8
_MAX_EXPONENT_OCTAVES = 1.0  # divergences are raised to powers from 1/2 to 2
_MIN_BUDGET = 0.002


class DepthProfileSpace(SearchSpace):
    """About ten continuous parameters that reweight a sensitivity table, and the allocation over the result.

    The parameters are:

    - `budget`: the reduction.
    - `depth.0`, `depth.1`, ...: the depth profile. Logarithms of the weight of divergences at knots from the first
      layer to the last, interpolated linearly.
    - `weight.<kind>`: the weight of this kind of unit relative to the first kind (MLP relative to attention).
    - `removal`: the weight of removing a block relative to reducing its ranks.
    - `width`: the weight of reducing the width of an MLP relative to reducing its ranks.
    - `evenness`: an exponent on all divergences. Above 1 the divergence is spread over the units, below 1 concentrated.
    - `method`: the decomposition method, if there are several.

    Each has 101 levels, so that this space consists of levels like all others. With all parameters at their middle
    level the weights are 1.

    Levels do not determine all points of the space: search may also propose other combinations of the table's options.
    `levels_of` then returns the nearest levels, from which the sampler learns.
    """

    def __init__(self, config: SearchSpaceConfig, topology: Topology, table: SensitivityTable | None = None) -> None:
        super().__init__(config, topology)
        self.table = block_table(config, topology) if table is None else table
        self._known: dict[tuple[int, ...], DesignPoint] = {}

    def with_table(self, table: SensitivityTable) -> DepthProfileSpace:
        """The same space over another sensitivity table."""
        return DepthProfileSpace(self.config, self.topology, table)

    @cached_property
    def grid(self) -> TableSpace:
        """The space of all combinations of the table's options, for refinement."""
        return TableSpace(self.config, self.topology, self.table)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units in order of appearance; weights are relative to the first."""
        return tuple(dict.fromkeys(unit.kind for unit in self.table.units))

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """One dimension per parameter."""
        names = [_BUDGET, *(f"depth.{knot}" for knot in range(self.config.knots))]
        names += [f"weight.{kind}" for kind in self.kinds[1:]]
        names += [_REMOVAL] if self.config.removal else []
        names += [_WIDTH] if self.config.widths else []
        sizes = dict.fromkeys([*names, _EVENNESS], RESOLUTION)
        return {**sizes, _METHOD: len(self.config.methods)} if len(self.config.methods) > 1 else sizes

    @property
    def dense_levels(self) -> dict[str, int]:
        """Budget 0; all other parameters at their middle level."""
        return {**self._neutral, _BUDGET: 0}

    @cached_property
    def _neutral(self) -> dict[str, int]:
        return {name: 0 if name == _METHOD else _MIDDLE for name in self.dimensions}

    @cached_property
    def budgets(self) -> tuple[float, float]:
        """Reductions at the first and the last level of the budget above dense."""
        smallest, largest = self.reduction_range()
        low, high = max(self.limits[0], smallest, _MIN_BUDGET), min(self.limits[1], largest)
        return low, max(low, high)

    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The allocation at the budget, with divergences weighted by the levels."""
        key = tuple(levels[name] for name in self.dimensions)
        if key not in self._known:
            self._known[key] = self._allocated(levels)
        return self._known[key]

    def _allocated(self, levels: Mapping[str, int]) -> DesignPoint:
        if not levels[_BUDGET]:
            return DesignPoint.dense()
        low, high = self.budgets
        wanted = low + (high - low) * (levels[_BUDGET] - 1) / (RESOLUTION - 2)
        table = self._weighted(levels)
        # An allocation may overshoot the budget by part of an option, and with it the upper limit.
        for target in (wanted, wanted - 0.002, wanted - 0.005, low):
            try:
                point = allocate(table, reduction=max(target, 0.0), constraints=self._constraints).point
                if point_cost(self.topology, point).reduction <= self.limits[1]:
                    return point
            except (AllocationError, PointError):  # out of reach, or not applicable to the model
                continue
        return DesignPoint.dense()

    @cached_property
    def _constraints(self) -> AllocationConstraints:
        return constraints_of(self)

    def _weighted(self, levels: Mapping[str, int]) -> SensitivityTable:
        method = self.config.methods[levels.get(_METHOD, 0)]
        knots = [_octaves(levels[f"depth.{knot}"]) for knot in range(self.config.knots)]
        weights = {kind: _octaves(levels[f"weight.{kind}"]) for kind in self.kinds[1:]}
        removal, width = (_octaves(levels[name]) if name in levels else 0.0 for name in (_REMOVAL, _WIDTH))
        exponent = 2.0 ** (_octaves(levels[_EVENNESS]) / _MAX_OCTAVES * _MAX_EXPONENT_OCTAVES)

        def factor(unit: Unit, option: Option) -> float:
            octaves = weights.get(unit.kind, 0.0)
            octaves += removal * option.removes_block + width * option.narrows_mlp
            octaves += at_depth(knots, unit.layer, self.topology.layer_count)
            # d -> 2^octaves d^exponent, as a factor on d; other methods get a prohibitive factor.
            others = any(choice.has_factors and choice.method != method for _, choice in option.choices)
            return float(2.0**octaves * max(option.divergence, 1e-9) ** (exponent - 1.0) * (1e6 if others else 1.0))

        return self.table.scaled(factor)

    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """The nearest levels; all combinations of the table's options count as points of the space."""
        if point.is_dense:
            return self.dense_levels
        for name, choice in point:
            # The roles of a space do not apply to routed experts that are removed with a block.
            block = self.topology.blocks_by_name.get(name)
            changed = block.tensors if choice.is_removal and block is not None else self.topology.tensors_of(name)
            for tensor in map(self.topology.part, changed):
                if tensor.layer not in self.layers or tensor.role not in self.roles:
                    raise outside_space(point, self, f"'{name}' is not among its tensors")
            allowed = [*self.config.methods, *([REMOVED] if self.config.removal else [])]
            if choice.method not in [*allowed, *([WIDTH] if self.config.widths else [])]:
                raise outside_space(point, self, f"'{name}' has method {choice.method}")
            if name in self.topology.by_name and choice.form not in self.config.factor_forms:
                raise outside_space(point, self, f"'{name}' has {choice.form or 'plain'} factors")
        return self._nearest(point)

    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """The budget nearest to the point's reduction; all other parameters at their middle level."""
        low, high = self.budgets
        share = (point_cost(self.topology, point).reduction - low) / (high - low) if high > low else 0.0
        return {**self._neutral, _BUDGET: 1 + round(min(max(share, 0.0), 1.0) * (RESOLUTION - 2))}

    def number_of_points(self) -> int:
        """Number of combinations of options: the points of allocations, refinement and warm starts."""
        return self.grid.number_of_points()

    def number_of_configurations(self) -> int:
        """Number of combinations of levels."""
        return math.prod(self.dimensions.values())

    def reduction_range(self) -> tuple[float, float]:
        """The range of all combinations of options."""
        return self.grid.reduction_range()

    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """Every tensor up to its largest rank, and every MLP; the bank then serves any table and the user's points."""
        tensors = [t for t in self.topology.tensors if t.layer in self.layers and t.role in self.roles]
        ranks = {
            method: {
                t.name: max(largest_rank(t, TensorChoice(method, 1, form=form)) for form in self.config.factor_forms)
                for t in tensors
            }
            for method in self.config.methods
        }
        inside = {tensor.name for tensor in tensors}
        mlps = [mlp for mlp in self.topology.mlps if inside >= set(self.topology.tensors_of(mlp.name))]
        return {**ranks, WIDTH: {mlp.name: mlp.channels for mlp in mlps}} if self.config.widths and mlps else ranks

    def feasible_levels(self) -> list[dict[str, int]] | None:
        """None: the space is too large to list."""
        return None

    def repair(self, levels: Mapping[str, int], generator: random.Random) -> dict[str, int] | None:
        """The same depth profile at a random other budget; needed for the dense point and unreachable budgets only."""
        for _ in range(8):
            moved = {**levels, _BUDGET: generator.randrange(1, RESOLUTION)}
            point = self.point(moved)
            if not point.is_dense and self.is_feasible(point):
                return moved
        return None

    def check_limits(self) -> None:
        """Check that the space has a feasible point, and that the smallest budget has an allocation.

        Raises:
            ConfigError: No point satisfies the limits.
        """
        super().check_limits()
        if self.point({**self._neutral, _BUDGET: 1}).is_dense:
            raise ConfigError(
                f"an allocation must exist within the limits of space '{self.config.name}', but none reaches the"
                f" reduction {self.budgets[0]:.4g}; loosen `limits`, `keep_layers` or `keep_roles`"
            )

    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """Random levels near the middle, and a budget between `low` and `high`."""
        first, last = self.budgets
        span = (last - first) or 1.0
        levels = {
            name: min(max(round(generator.gauss(_MIDDLE, RESOLUTION / 6)), 0), size - 1)
            for name, size in self.dimensions.items()
        }
        if _METHOD in levels:
            levels[_METHOD] = generator.randrange(self.dimensions[_METHOD])
        share = (generator.uniform(low, high) - first) / span
        return {**levels, _BUDGET: 1 + round(min(max(share, 0.0), 1.0) * (RESOLUTION - 2))}


def _octaves(level: int) -> float:
    """Logarithm to base 2 of the weight at a level; 0 at the middle level."""
    return (level - _MIDDLE) / _MIDDLE * _MAX_OCTAVES


def at_depth(knots: list[float], layer: int | None, layer_count: int) -> float:
    """Linear interpolation between knots at equal distances from the first layer to the last; 0 outside the layers."""
    if layer is None or not knots:
        return 0.0
    return float(np.interp(layer / max(layer_count - 1, 1) * (len(knots) - 1), range(len(knots)), knots))
