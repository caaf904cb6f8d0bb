"""`kind: depth_profile`: a budget and a smooth profile over depth, which an exact allocation turns into a point."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cached_property

from dse.config import SearchSpaceConfig
from dse.cost import break_even_rank, cost, has_core
from dse.design_point import DesignPoint
from dse.errors import AllocationError, ConfigError, PointError
from dse.search.spaces.base import SearchSpace, outside_space
from dse.search.spaces.prior_table import block_table
from dse.search.spaces.table_space import TableSpace, constraints_of
from dse.sensitivity.allocation import allocate
from dse.sensitivity.allocation_constraints import Constraints
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology

__all__ = ["MARKS", "DepthProfileSpace"]

MARKS = 101
"""Marks on the ruler of each continuous parameter: a step is far below what an evaluation can tell apart."""

_BUDGET, _METHOD, _REMOVAL, _EVENNESS = "budget", "method", "removal", "evenness"
_MIDDLE = (MARKS - 1) // 2
_MOST_OCTAVES = 3.0  # divergences are weighed by up to 8 times, and down to an eighth
_MOST_EXPONENT_OCTAVES = 1.0  # divergences are raised to powers from 1/2 to 2
_SMALLEST_MARK = 0.002


class DepthProfileSpace(SearchSpace):
    """About ten continuous parameters that reshape a divergence table, and the allocation that it then gives.

    Parameter by parameter: `budget` is the reduction; `depth.0`, `depth.1`, ... are the logarithms of the weight of
    divergence at knots from the first layer to the last, interpolated between; `weight.<kind>` weighs MLP against
    attention; `removal` weighs removing a block against reducing its rank; `evenness` is an exponent on all divergences
    (above 1 the loss is spread, below 1 it is concentrated); `method`, where there are several, is the one used. Each
    is a ruler of 101 marks, so that this space is made of levels as every other. In the middle of all rulers the
    allocation is the plain one.

    A point of this space is more than its levels can say: whatever the table's options combine to may be proposed
    beside them, and `levels_of` gives the nearest levels, which is what the sampler learns from.
    """

    def __init__(self, config: SearchSpaceConfig, topology: Topology, table: SensitivityTable | None = None) -> None:
        super().__init__(config, topology)
        self.table = block_table(config, topology) if table is None else table
        self._known: dict[tuple[int, ...], DesignPoint] = {}

    def with_table(self, table: SensitivityTable) -> DepthProfileSpace:
        """The same space over another table of divergences."""
        return DepthProfileSpace(self.config, self.topology, table)

    @cached_property
    def grid(self) -> TableSpace:
        """All that the table's options combine to; refinement moves in it."""
        return TableSpace(self.config, self.topology, self.table)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units, in order of appearance; the first is the one others are weighed against."""
        return tuple(dict.fromkeys(unit.kind for unit in self.table.units))

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """One ruler a parameter."""
        names = [_BUDGET, *(f"depth.{knot}" for knot in range(self.config.knots))]
        names += [f"weight.{kind}" for kind in self.kinds[1:]]
        names += [_REMOVAL] if self.config.removal else []
        sizes = dict.fromkeys([*names, _EVENNESS], MARKS)
        return {**sizes, _METHOD: len(self.config.methods)} if len(self.config.methods) > 1 else sizes

    @property
    def dense_levels(self) -> dict[str, int]:
        """No budget; everything else in the middle."""
        return {**self._neutral, _BUDGET: 0}

    @cached_property
    def _neutral(self) -> dict[str, int]:
        return {name: 0 if name == _METHOD else _MIDDLE for name in self.dimensions}

    @cached_property
    def budgets(self) -> tuple[float, float]:
        """Reductions from the first mark of the budget to the last."""
        smallest, largest = self.reduction_range()
        low, high = max(self.limits[0], smallest, _SMALLEST_MARK), min(self.limits[1], largest)
        return low, max(low, high)

    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The allocation under the budget, divergences weighed as the levels say."""
        key = tuple(levels[name] for name in self.dimensions)
        if key not in self._known:
            self._known[key] = self._allocated(levels)
        return self._known[key]

    def _allocated(self, levels: Mapping[str, int]) -> DesignPoint:
        if not levels[_BUDGET]:
            return DesignPoint.dense()
        low, high = self.budgets
        wanted = low + (high - low) * (levels[_BUDGET] - 1) / (MARKS - 2)
        table = self._weighed(levels)
        # The budget is kept from above, so that it may be overshot by part of an option, and a limit with it.
        for target in (wanted, wanted - 0.002, wanted - 0.005, low):
            try:
                point = allocate(table, reduction=max(target, 0.0), constraints=self._constraints).point
                if cost(self.topology, point).reduction <= self.limits[1]:
                    return point
            except (AllocationError, PointError):  # out of reach for this method, or for any model to run
                continue
        return DesignPoint.dense()

    @cached_property
    def _constraints(self) -> Constraints:
        return constraints_of(self)

    def _weighed(self, levels: Mapping[str, int]) -> SensitivityTable:
        method = self.config.methods[levels.get(_METHOD, 0)]
        knots = [_octaves(levels[f"depth.{knot}"]) for knot in range(self.config.knots)]
        weights = {kind: _octaves(levels[f"weight.{kind}"]) for kind in self.kinds[1:]}
        removal = _octaves(levels[_REMOVAL]) if _REMOVAL in levels else 0.0
        exponent = 2.0 ** (_octaves(levels[_EVENNESS]) / _MOST_OCTAVES * _MOST_EXPONENT_OCTAVES)

        def factor(unit: Unit, option: Option) -> float:
            octaves = weights.get(unit.kind, 0.0) + (removal if option.removes_block else 0.0)
            octaves += at_depth(knots, unit.layer, self.topology.layer_count)
            # d -> 2^octaves d^exponent, as a factor on d; another method than the chosen one is out of the question.
            others = any(choice.method not in (method, "removed") for _, choice in option.choices)
            return float(2.0**octaves * max(option.divergence, 1e-9) ** (exponent - 1.0) * (1e6 if others else 1.0))

        return self.table.scaled(factor)

    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """The nearest levels: every combination of the table's options counts as a point of the space."""
        if point.is_dense:
            return self.dense_levels
        for name, choice in point:
            # What goes with a removed block beside its matrices (routed experts) is no matter of roles.
            block = self.topology.blocks_by_name.get(name)
            touched = self.topology.tensors_of(name) if block is None else block.tensors
            for tensor in map(self.topology.part, touched):
                if tensor.layer not in self.layers or tensor.role not in self.roles:
                    raise outside_space(point, self, f"'{name}' is not among its tensors")
            if choice.method not in (*self.config.methods, *(["removed"] if self.config.removal else [])):
                raise outside_space(point, self, f"'{name}' is treated by {choice.method}")
        return self._nearest(point)

    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """The budget by the point's reduction, everything else in the middle."""
        low, high = self.budgets
        share = (cost(self.topology, point).reduction - low) / (high - low) if high > low else 0.0
        return {**self._neutral, _BUDGET: 1 + round(min(max(share, 0.0), 1.0) * (MARKS - 2))}

    def number_of_points(self) -> int:
        """All that the options combine to: what allocation, refinement and warm starts may propose."""
        return self.grid.number_of_points()

    def number_of_configurations(self) -> int:
        """Combinations of marks."""
        return math.prod(self.dimensions.values())

    def reduction_range(self) -> tuple[float, float]:
        """Of all combinations of options."""
        return self.grid.reduction_range()

    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """Every tensor up to break-even: options of any table fit, and so do the user's own points."""
        tensors = [t for t in self.topology.tensors if t.layer in self.layers and t.role in self.roles]
        return {
            method: {t.name: break_even_rank(*t.shape, core=has_core(method)) for t in tensors}
            for method in self.config.methods
        }

    def feasible_levels(self) -> list[dict[str, int]] | None:
        """Too many to list."""
        return None

    def repair(self, levels: Mapping[str, int], generator: random.Random) -> dict[str, int] | None:
        """The same profile at another budget: only the dense model and unreachable budgets need it."""
        for _ in range(8):
            moved = {**levels, _BUDGET: generator.randrange(1, MARKS)}
            point = self.point(moved)
            if not point.is_dense and self.is_feasible(point):
                return moved
        return None

    def check_limits(self) -> None:
        """As every space; and some method must be there that the table knows."""
        super().check_limits()
        if self.point({**self._neutral, _BUDGET: 1}).is_dense:
            raise ConfigError(
                f"some allocation must reach the limits of space '{self.config.name}', but none reaches a reduction of"
                f" {self.budgets[0]:.4g}; loosen `limits`, `keep_layers` or `keep_roles`"
            )

    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """Random marks near the middle, and a budget between the two."""
        first, last = self.budgets
        span = (last - first) or 1.0
        levels = {
            name: min(max(round(generator.gauss(_MIDDLE, MARKS / 6)), 0), size - 1)
            for name, size in self.dimensions.items()
        }
        if _METHOD in levels:
            levels[_METHOD] = generator.randrange(self.dimensions[_METHOD])
        share = (generator.uniform(low, high) - first) / span
        return {**levels, _BUDGET: 1 + round(min(max(share, 0.0), 1.0) * (MARKS - 2))}


def _octaves(level: int) -> float:
    """A mark as a power of two of a weight; 0 in the middle."""
    return (level - _MIDDLE) / _MIDDLE * _MOST_OCTAVES


def at_depth(knots: list[float], layer: int | None, layer_count: int) -> float:
    """Linear interpolation between knots that stand evenly from the first layer to the last."""
    if layer is None or not knots:
        return 0.0
    place = layer / max(layer_count - 1, 1) * (len(knots) - 1)
    below = min(int(place), len(knots) - 1)
    above = min(below + 1, len(knots) - 1)
    return knots[below] + (knots[above] - knots[below]) * (place - below)
