"""The combinations of a sensitivity table's options as a search space."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from functools import cached_property

from dse.config import SearchSpaceConfig
from dse.design_point import DesignPoint
from dse.errors import PointError
from dse.search.spaces.base import SearchSpace, outside_space
from dse.search.spaces.rank_levels import saved_by_tensor, saved_in_parts
from dse.sensitivity.allocation_constraints import AllocationConstraints
from dse.sensitivity.option import Option
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology

__all__ = ["TableSpace", "constraints_of"]


def constraints_of(space: SearchSpace) -> AllocationConstraints:
    """Constraints that keep allocations within the layers and roles of a space.

    At most half as many blocks as the model has layers may be removed, because a model needs attention.
    """
    topology = space.topology
    dense_roles = {tensor.role for tensor in topology.tensors} - set(space.roles) | set(space.config.keep_roles)
    dense_parts = set()
    for part in (*topology.matrices, *topology.experts, *topology.blocks, *topology.mlps):
        roles = {topology.part(name).role for name in topology.tensors_of(part.name)}
        if roles & dense_roles or (part.layer is not None and part.layer not in space.layers):
            dense_parts.add(part.name)
    return AllocationConstraints(dense_parts=frozenset(dense_parts), max_removed_blocks=topology.layer_count // 2)


class TableSpace(SearchSpace):
    """One dimension per unit of a table; level 0 is dense, and higher levels are options with fewer parameters."""

    def __init__(self, config: SearchSpaceConfig, topology: Topology, table: SensitivityTable) -> None:
        super().__init__(config, topology)
        self.table = table
        allowed = constraints_of(self).allowed_options(table)
        self._options: dict[str, tuple[Option, ...]] = {}
        for unit, options in zip(table.units, allowed, strict=True):
            smaller = [option for option in options if not option.is_dense]
            smaller.sort(key=lambda option: (-option.parameters, option.choices))
            if smaller:
                self._options[unit.name] = (unit.dense, *smaller)
        self._check_not_empty(self._options, "layers or roles")

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """One dimension per unit."""
        return {name: len(options) for name, options in self._options.items()}

    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The design point of these levels."""
        return DesignPoint(tuple(c for name, options in self._options.items() for c in options[levels[name]].choices))

    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """Levels of a point of this space."""
        levels = self.dense_levels
        rest = dict(point.choices)
        for unit in self.table.units:
            own = tuple(sorted((name, rest.pop(name)) for name in unit.names if name in rest))
            if not own:
                continue
            found = [i for i, option in enumerate(self._options.get(unit.name, ())) if option.choices == own]
            if not found:
                raise outside_space(point, self, f"'{unit.name}' has no such option")
            levels[unit.name] = found[0]
        if rest:
            raise outside_space(point, self, f"'{next(iter(rest))}' is not among its tensors")
        return levels

    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """For each unit the option whose savings are nearest to those of its tensors in the point."""
        saved = saved_by_tensor(self.topology, point)
        levels = {}
        for unit in self.table.units:
            if unit.name in self._options:
                dense, target = unit.dense.parameters, saved_in_parts(self.topology, saved, unit.names)
                gaps = [abs(dense - option.parameters - target) for option in self._options[unit.name]]
                levels[unit.name] = gaps.index(min(gaps))
        return levels

    def violations(self, point: DesignPoint) -> dict[str, float]:
        """As in every space; a point that is not applicable to the model violates the constraint `applicable`."""
        try:
            return super().violations(point)
        except PointError:
            return {"applicable": 1.0}

    def number_of_points(self) -> int:
        """Product of the options, without points that remove all attention of a kind."""
        kinds = [own for own in self._attention_by_kind if all(name in self._removable for name in own)]
        total = 0
        for chosen in itertools.chain.from_iterable(
            itertools.combinations(kinds, size) for size in range(len(kinds) + 1)
        ):
            gone = {name for own in chosen for name in own}
            others = math.prod(size for name, size in self.dimensions.items() if name not in gone)
            total += (-1) ** len(chosen) * others
        return total

    @cached_property
    def _attention_by_kind(self) -> list[tuple[str, ...]]:
        """Attention blocks of each kind of KV cache; at least one of each kind must remain."""
        kinds: dict[str, list[str]] = {}
        for block in self.topology.blocks:
            if block.role == "attention":
                kinds.setdefault(block.cache_kind, []).append(block.name)
        return [tuple(names) for names in kinds.values()]

    @cached_property
    def _removable(self) -> set[str]:
        """Names of the units with an option that removes them."""
        return {name for name, options in self._options.items() if any(option.removes_block for option in options)}

    def number_of_configurations(self) -> int:
        """The number of points."""
        return self.number_of_points()

    def reduction_range(self) -> tuple[float, float]:
        """The reductions of the mildest option, and of the smallest options with as many removals as are allowed."""
        saved = {
            name: [options[0].parameters - o.parameters for o in options[1:]] for name, options in self._options.items()
        }
        smallest = min(min(of_unit) for of_unit in saved.values())
        decomposed = {
            name: max((options[0].parameters - o.parameters for o in options[1:] if not o.removes_block), default=0)
            for name, options in self._options.items()
        }
        gains = sorted((max(saved[name]) - decomposed[name] for name in saved), reverse=True)
        largest = sum(decomposed.values()) + sum(gains[: self.topology.layer_count // 2])
        return smallest / self.topology.parameters_dense, largest / self.topology.parameters_dense

    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """The largest ranks of all options."""
        found: dict[str, dict[str, int]] = {}
        for options in self._options.values():
            for name, choice in (pair for option in options for pair in option.choices if not pair[1].is_removal):
                ranks = found.setdefault(choice.method, {})
                ranks[name] = max(choice.rank, ranks.get(name, 0))
        return found

    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """Raise units in random order, each to a random level, until a target between `low` and `high` is reached."""
        levels = self.dense_levels
        dense = self.topology.parameters_dense
        target, saved = generator.uniform(low, high) * dense, 0
        for name in generator.sample(list(self._options), len(self._options)):
            options = self._options[name]
            fitting = [
                level
                for level in range(1, len(options))
                if saved + options[0].parameters - options[level].parameters <= high * dense
            ]
            if saved >= target:
                break
            if fitting:
                levels[name] = generator.choice(fitting)
                saved += options[0].parameters - options[levels[name]].parameters
        return levels
