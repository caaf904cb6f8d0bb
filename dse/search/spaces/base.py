"""What every search space offers; the two kinds of `dse.config.SearchSpaceConfig` implement it."""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dse.config import LayerRange, SearchSpaceConfig, load_search_space
from dse.cost import cost, parameters_saved
from dse.decomposition import METHODS
from dse.design_point import DesignPoint
from dse.errors import ConfigError, PointError, did_you_mean
from dse.expert_tensor import EXPERT_ROLES
from dse.search.spaces.limits import reduction_limits, violations_of_cost
from dse.topology import Topology

if TYPE_CHECKING:
    from typing import Any

__all__ = ["KNOWN_ROLES", "SearchSpace"]

KNOWN_ROLES = (
    "query", "key", "value", "query_key_value", "attention_output",
    "gate", "up", "gate_up", "down", "intermediate", "output", *EXPERT_ROLES,
)  # fmt: skip
"""Roles of all architectures; a space may name ones that the model at hand does not have."""

_ATTEMPTS = 300
_LISTABLE = 4096
"""Configurations up to which a space is listed where random draws do not serve."""


class SearchSpace(ABC):
    """The points that a study may propose for one model.

    A point is written as levels: dimension name to an integer from 0 (dense, or the first choice) upwards, where higher
    levels keep less. Integers with an order serve every sampler, model-based ones above all.
    """

    def __init__(self, config: SearchSpaceConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.layers = _layers(config, topology)
        self.roles = _roles(config, topology)

    @staticmethod
    def from_config(config: SearchSpaceConfig, topology: Topology) -> SearchSpace:
        """Build the space of `config` on a model.

        Raises:
            ConfigError: The space names what the model does not have, or no point lies within its limits.
        """
        from dse.search.spaces import SPACES

        space = SPACES[config.kind](config, topology)
        space.check_limits()
        return space

    @staticmethod
    def from_file(path: str | Path, topology: Topology) -> SearchSpace:
        """Read a search-space file for a model; see `from_config`."""
        return SearchSpace.from_config(load_search_space(Path(path)), topology)

    @property
    @abstractmethod
    def dimensions(self) -> Mapping[str, int]:
        """Dimension name to its number of levels."""

    @abstractmethod
    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The design point of these levels (all dimensions given)."""

    @abstractmethod
    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """Levels of a point of this space.

        Raises:
            PointError: The point does not lie in the space.
        """

    def nearest_levels(self, point: DesignPoint) -> dict[str, int]:
        """The point's levels, or those that save most nearly the same parameters where it lies outside them.

        Args:
            point: Of tensors of this space, by any method and at any rank.
        """
        try:
            return self.levels_of(point)
        except PointError:
            return self._nearest(point)

    @abstractmethod
    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """Levels like a point that has none."""

    @abstractmethod
    def number_of_points(self) -> int:
        """Distinct design points, dense included, before limits."""

    @abstractmethod
    def number_of_configurations(self) -> int:
        """Combinations of levels as the source of the space counts them (several may be one point)."""

    @abstractmethod
    def reduction_range(self) -> tuple[float, float]:
        """Smallest reduction of a point that is not dense, and the largest reduction."""

    @abstractmethod
    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """A random point that aims at a reduction between `low` and `high`; it may miss."""

    @abstractmethod
    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """Method to tensor name to the largest rank that any point asks for."""

    def ladder(self) -> list[dict[str, int]]:
        """Levels of the plain points of the space, such as one role group at one level in every layer.

        They are what a person would try first, and trace a first front; none by default.
        """
        return []

    @property
    def dense_levels(self) -> dict[str, int]:
        """The levels of the dense model."""
        return dict.fromkeys(self.dimensions, 0)

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Reductions that keep the limits on reduction and on weight bytes, open ends filled in."""
        return reduction_limits(self.config.limits, self.topology)

    def violations(self, point: DesignPoint) -> dict[str, float]:
        """Constraint name to its value; <= 0 is feasible (Optuna's convention). From the point alone."""
        return violations_of_cost(self.config.limits, cost(self.topology, point))

    def is_feasible(self, point: DesignPoint) -> bool:
        """Whether the point keeps the limits."""
        return all(value <= 0 for value in self.violations(point).values())

    def draw_feasible(
        self, generator: random.Random, low: float | None = None, high: float | None = None
    ) -> dict[str, int] | None:
        """Levels of a random feasible point, aiming at reductions between `low` and `high`; None if none was found."""
        smallest, largest = self.reduction_range()
        floor, ceiling = max(self.limits[0], smallest), min(self.limits[1], largest)
        low, high = max(floor, floor if low is None else low), min(ceiling, ceiling if high is None else high)
        for _ in range(_ATTEMPTS):
            levels = self._draw(generator, low, max(low, high))
            point = self.point(levels)
            if not point.is_dense and self.is_feasible(point):
                return levels
        listed = self.feasible_levels()
        return generator.choice(listed) if listed else None

    def feasible_levels(self) -> list[dict[str, int]] | None:
        """Levels of every feasible point but the dense one; None where the space is too large to list."""
        if self.number_of_configurations() > _LISTABLE:
            return None
        names, sizes = list(self.dimensions), self.dimensions.values()
        combinations = [dict(zip(names, levels, strict=True)) for levels in itertools.product(*map(range, sizes))]
        points = {}
        for levels in combinations:
            point = self.point(levels)
            if not point.is_dense and point.id not in points and self.is_feasible(point):
                points[point.id] = levels
        return list(points.values())

    def repair(self, levels: Mapping[str, int], generator: random.Random) -> dict[str, int] | None:
        """A feasible neighbour of infeasible levels: random dimensions are moved a level at a time into the limits.

        It keeps much of what a sampler proposed, where a fresh draw would keep nothing. It does not stop at the limit
        that was broken, but at a reduction drawn between the limits: in a large space most proposals break the same
        limit, and all trials would crowd there.
        """
        moved = dict(levels)
        smallest, largest = self.reduction_range()
        target = generator.uniform(max(self.limits[0], smallest), min(self.limits[1], largest))
        order = [name for name, size in self.dimensions.items() if size > 1]
        reduction = cost(self.topology, self.point(moved)).reduction
        step = -1 if reduction > self.limits[1] else 1
        for _ in range(_ATTEMPTS):
            point = self.point(moved)
            reached = cost(self.topology, point).reduction
            within = not point.is_dense and self.is_feasible(point)
            if within and (moved == levels or step * (reached - target) >= 0):
                return moved
            fallback = dict(moved) if within else None
            movable = [name for name in order if 0 <= moved[name] + step < self.dimensions[name]]
            if not movable:
                return fallback
            moved[generator.choice(movable)] += step
            if fallback is not None and not self.is_feasible(self.point(moved)):
                return fallback
        return None

    def check_limits(self) -> None:
        """Refuse a space without a feasible point.

        Raises:
            ConfigError: No point lies within the limits.
        """
        smallest, largest = self.reduction_range()
        low, high = self.limits
        name = f"space '{self.config.name}' on {self.topology.architecture}"
        if low > high:
            raise ConfigError(
                f"constraints must leave room for a point, but those of {name} exclude each other:"
                f" `limits.weight_bytes` and `limits.reduction` together ask for reductions of at least {low:.4g} and"
                f" at most {high:.4g}; loosen one of them"
            )
        kept = [f"{key} {value}" for key in ("keep_layers", "keep_roles") if (value := getattr(self.config, key))]
        name += f" ({', '.join(kept)})" if kept else ""
        reach = f"{name} reaches reductions of {smallest:.4g} to {largest:.4g}"
        if low > largest or high < smallest:
            raise ConfigError(
                f"some point must lie within `limits.reduction`, but {reach} and the limits are"
                f" {_end(low)} to {_end(high)}; widen one of them"
            )
        if low > 0 and self.draw_feasible(random.Random(0)) is None:
            raise ConfigError(
                f"some point must lie within `limits.reduction`, but none was found between"
                f" {_end(low)} and {_end(high)} ({reach}); widen them"
            )

    def describe(self) -> dict[str, Any]:
        """What `dse space` prints."""
        count, (smallest, largest) = self.number_of_points(), self.reduction_range()
        limits = self.config.limits
        return {
            "name": self.config.name,
            "kind": self.config.kind,
            "architecture": self.topology.architecture,
            "methods": list(self.config.methods),
            "layers": list(self.layers),
            "roles": list(self.roles),
            "tensors": len(self.tensor_names()),
            "removable_blocks": len(self.topology.blocks),
            "dimensions": len(self.dimensions),
            "ranks": self._rank_listing(),
            "number_of_points": count,
            "number_of_points_log2": math.log2(count),
            "number_of_configurations": self.number_of_configurations(),
            "number_of_configurations_log2": math.log2(self.number_of_configurations()),
            "smallest_reduction": smallest,
            "largest_reduction": largest,
            "limits": {
                name: limit
                for name, limit in limits.model_dump().items()
                if name == "reduction" or any(end is not None for end in limit.values())
            },
            "keep_layers": list(self.config.keep_layers),
            "keep_roles": list(self.config.keep_roles),
        }

    def tensor_names(self) -> tuple[str, ...]:
        """Tensors that some point decomposes."""
        named = {name for ranks in self.largest_ranks().values() for name in ranks}
        parts = (*self.topology.matrices, *self.topology.experts)
        return tuple(part.name for part in parts if part.name in named)

    def _rank_listing(self) -> dict[str, list[int]]:
        """Role (or tensor outside the layers) to the ranks it may take, over methods and layers."""
        from dse.search.spaces.rank_grid import level_count, rank_at

        listing: dict[str, set[int]] = {}
        for name in self.tensor_names():
            tensor = self.topology.decomposable(name)
            for method in self.config.methods:
                grid = self.config.ranks
                listing.setdefault(tensor.role, set()).update(
                    rank_at(grid, index, tensor, method) for index in range(level_count(grid))
                )
        return {role: sorted(ranks) for role, ranks in listing.items()}

    def _saving(self, point: DesignPoint) -> float:
        return parameters_saved(self.topology, point) / self.topology.parameters_dense


def _end(limit: float) -> str:
    return f"{limit:.4g}" if math.isfinite(limit) else "any"


def _layers(config: SearchSpaceConfig, topology: Topology) -> tuple[int, ...]:
    """The layers that may change: those of the space without those to keep."""
    everything = range(topology.layer_count)
    for layer in config.keep_layers:
        if layer not in everything:
            raise ConfigError(
                f"`0 <= layer < {topology.layer_count}` must hold for {topology.architecture}, but `keep_layers` of"
                f" space '{config.name}' names layer {layer}"
            )
    named = _named_layers(config, topology)
    chosen = tuple(layer for layer in named if layer not in config.keep_layers)
    if not chosen:
        raise ConfigError(
            f"constraints must leave room for a point, but `keep_layers` {config.keep_layers} of space '{config.name}'"
            f" keeps every layer that `layers` offers; name fewer"
        )
    return chosen


def _named_layers(config: SearchSpaceConfig, topology: Topology) -> tuple[int, ...]:
    everything = range(topology.layer_count)
    if config.layers == "all":
        return tuple(everything)
    if isinstance(config.layers, LayerRange):
        chosen = everything[config.layers.skip_first : topology.layer_count - config.layers.skip_last]
        if not chosen:
            raise ConfigError(
                f"`layers` of space '{config.name}' must leave at least one of {topology.layer_count} layers, but skips"
                f" the first {config.layers.skip_first} and the last {config.layers.skip_last}"
            )
        return tuple(chosen)
    for layer in config.layers:
        if layer not in everything:
            raise ConfigError(
                f"`0 <= layer < {topology.layer_count}` must hold for {topology.architecture}, but space"
                f" '{config.name}' names layer {layer}"
            )
    if not config.layers:
        raise ConfigError(f"`layers` of space '{config.name}' must name at least one layer, but is empty")
    return tuple(sorted(set(config.layers)))


def _roles(config: SearchSpaceConfig, topology: Topology) -> tuple[str, ...]:
    """The roles that may change: those of the space without those to keep."""
    kept = check_roles(config.keep_roles, config.name, topology)
    chosen = tuple(role for role in _named_roles(config, topology) if role not in kept)
    if not chosen:
        raise ConfigError(
            f"constraints must leave room for a point, but `keep_roles` {config.keep_roles} of space '{config.name}'"
            f" keeps every role that `roles` offers; name fewer"
        )
    return chosen


def _named_roles(config: SearchSpaceConfig, topology: Topology) -> tuple[str, ...]:
    outside = tuple(tensor.role for tensor in topology.tensors if tensor.layer is None)
    if config.roles == "all":
        stacked = dict.fromkeys(stack.role for stack in topology.stacks) if config.stacks else ()
        return (*topology.roles, *stacked, *outside)
    present = check_roles(config.roles, config.name, topology, stacks=config.stacks)
    if not present:
        known = (*topology.roles, *dict.fromkeys(tensor.role for tensor in topology.experts))
        reasons = [why for name, why in topology.experts_refused.items() if name.rpartition(".")[2] in config.roles]
        raise ConfigError(
            f"`roles` of space '{config.name}' must name a role of {topology.architecture}"
            f" ({', '.join(known)}), but got {config.roles}{''.join(f'; {why}' for why in reasons[:1])}"
        )
    _refuse_experts_out_of_place(config, present)
    return present


def _refuse_experts_out_of_place(config: SearchSpaceConfig, roles: Sequence[str]) -> None:
    """Fused expert tensors are decomposed by `tucker` in spaces of levels, and not beside a refit."""
    experts = [role for role in roles if role in EXPERT_ROLES and role not in config.keep_roles]
    if experts and config.kind != "levels":
        raise ConfigError(
            f"expert roles must be in a space of `kind: levels`, but space '{config.name}' of kind '{config.kind}'"
            f" names '{experts[0]}'; change its kind or leave the role out"
        )
    refits = [method for method in config.methods if METHODS[method].refit_of]
    if experts and refits:
        raise ConfigError(
            f"expert roles must go with methods that do not refit, but space '{config.name}' names '{experts[0]}' and"
            f" '{refits[0]}'; use '{METHODS[refits[0]].refit_of}' or leave the role out"
        )


def check_roles(roles: Sequence[str], space_name: str, topology: Topology, *, stacks: bool = False) -> tuple[str, ...]:
    """The roles of this list that the model has (of stacks too, if asked); ones that no architecture has are refused.

    Raises:
        ConfigError: A role is unknown.
    """
    known = set(KNOWN_ROLES) | {tensor.role for tensor in topology.tensors}
    for role in roles:
        if role not in known:
            raise ConfigError(
                f"a role must be one of {', '.join(sorted(known))}, but space '{space_name}' names '{role}'"
                f"{did_you_mean(role, known)}"
            )
    have = {tensor.role for tensor in topology.tensors} | {tensor.role for tensor in topology.experts}
    have |= {stack.role for stack in topology.stacks if stacks}
    return tuple(role for role in dict.fromkeys(roles) if role in have)


def outside_space(point: DesignPoint, space: SearchSpace, why: str) -> PointError:
    """The error of `levels_of`."""
    return PointError(f"point {point.id} must lie in search space '{space.config.name}', but {why}")
