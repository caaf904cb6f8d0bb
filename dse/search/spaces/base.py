"""The base class of search spaces."""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dse.config import SearchSpaceConfig, load_search_space
from dse.cost import point_cost
from dse.design_point import WIDTH, DesignPoint
from dse.errors import ConfigError, PointError
from dse.search.spaces.limits import reduction_limits, violations_of_cost
from dse.search.spaces.rank_levels import level_count, rank_at, width_levels
from dse.search.spaces.scope import layers_of_space, roles_of_space
from dse.topology import Topology

__all__ = ["SearchSpace", "outside_space"]

_ATTEMPTS = 300
_LISTABLE = 4096
"""Largest number of configurations at which a space is listed if random draws find nothing."""


class SearchSpace(ABC):
    """The points that a study may propose for one model.

    A point is written as levels: dimension name to an integer from 0 (dense, or the first choice) upwards; higher
    levels keep fewer parameters. All samplers support ordered integers, and model-based ones benefit from the order.
    """

    def __init__(self, config: SearchSpaceConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.layers = layers_of_space(config, topology)
        self.roles = roles_of_space(config, topology)

    @staticmethod
    def from_config(config: SearchSpaceConfig, topology: Topology) -> SearchSpace:
        """The space of a configuration on a model.

        Raises:
            ConfigError: The space names a layer or role that the model does not have, or no point satisfies its limits.
        """
        from dse.search.spaces import SPACES  # the subclasses import this module

        space = SPACES[config.kind](config, topology)
        space.check_limits()
        return space

    @staticmethod
    def from_file(path: str | Path, topology: Topology) -> SearchSpace:
        """The space of a search-space file on a model; see `from_config`."""
        return SearchSpace.from_config(load_search_space(Path(path)), topology)

    @property
    @abstractmethod
    def dimensions(self) -> Mapping[str, int]:
        """Dimension name to its number of levels."""

    @abstractmethod
    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The design point of these levels; all dimensions must be given."""

    @abstractmethod
    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """Levels of a point of this space.

        Raises:
            PointError: The point is outside the space.
        """

    def nearest_levels(self, point: DesignPoint) -> dict[str, int]:
        """The point's levels; if it has none, the levels that save the most similar number of parameters.

        Args:
            point: A point of tensors of this space, of any method and rank.
        """
        try:
            return self.levels_of(point)
        except PointError:
            return self._nearest(point)

    @abstractmethod
    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """The levels nearest to a point outside the space."""

    @abstractmethod
    def number_of_points(self) -> int:
        """Number of distinct design points, including dense, without regard to limits."""

    @abstractmethod
    def number_of_configurations(self) -> int:
        """Number of combinations of levels as counted in the literature; several may yield the same point."""

    @abstractmethod
    def reduction_range(self) -> tuple[float, float]:
        """The smallest reduction of a point that is not dense, and the largest reduction."""

    @abstractmethod
    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """Levels of a random point with a reduction between `low` and `high`, if possible."""

    @abstractmethod
    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """Method to tensor name to the largest rank of any point."""

    def uniform_points(self) -> list[dict[str, int]]:
        """Levels of points such as one role group at one level in all layers, for a first front; none by default."""
        return []

    @property
    def dense_levels(self) -> dict[str, int]:
        """The levels of the dense model."""
        return dict.fromkeys(self.dimensions, 0)

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The interval of reductions within the limits on reduction and weight bytes."""
        return reduction_limits(self.config.limits, self.topology)

    def violations(self, point: DesignPoint) -> dict[str, float]:
        """Constraint name to its value; <= 0 is feasible (Optuna's convention). Computed without an evaluation."""
        return violations_of_cost(self.config.limits, point_cost(self.topology, point))

    def is_feasible(self, point: DesignPoint) -> bool:
        """Whether the point satisfies the limits."""
        return all(value <= 0 for value in self.violations(point).values())

    def draw_feasible(
        self, generator: random.Random, low: float | None = None, high: float | None = None
    ) -> dict[str, int] | None:
        """Levels of a random feasible point; None if none is found.

        Args:
            low: Smallest reduction to aim at; None for the limit.
            high: Largest reduction to aim at; None for the limit.
        """
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
        """Levels of all feasible points except dense; None if the space is too large to list."""
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
        """A feasible neighbour of infeasible levels, reached by moving random dimensions one level at a time.

        The result resembles the sampler's proposal, unlike a fresh draw. The moves go on to a reduction drawn between
        the limits: in a large space most proposals violate the same limit, and all repaired points would otherwise lie
        there.

        Returns:
            The given levels if they are feasible; None if no feasible levels are reached.
        """
        moved = dict(levels)
        smallest, largest = self.reduction_range()
        target = generator.uniform(max(self.limits[0], smallest), min(self.limits[1], largest))
        order = [name for name, size in self.dimensions.items() if size > 1]
        reduction = point_cost(self.topology, self.point(moved)).reduction
        step = -1 if reduction > self.limits[1] else 1
        for _ in range(_ATTEMPTS):
            point = self.point(moved)
            reached = point_cost(self.topology, point).reduction
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

    def _check_not_empty(self, parts: Collection[object], remedy: str) -> None:
        if not parts:
            raise ConfigError(
                f"space '{self.config.name}' must hold at least one tensor of {self.topology.architecture}, but holds"
                f" none; change its {remedy}"
            )

    def check_limits(self) -> None:
        """Check that the space has a feasible point.

        Raises:
            ConfigError: No point satisfies the limits.
        """
        smallest, largest = self.reduction_range()
        low, high = self.limits
        name = f"space '{self.config.name}' on {self.topology.architecture}"
        if low > high:
            raise ConfigError(
                f"constraints must leave room for a point, but those of {name} contradict each other:"
                f" `limits.weight_bytes` and `limits.reduction` together require reductions of at least {low:.4g} and"
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
        """Summary of the space as printed by `dse space`."""
        count, (smallest, largest) = self.number_of_points(), self.reduction_range()
        limits = self.config.limits
        return {
            "name": self.config.name,
            "kind": self.config.kind,
            "architecture": self.topology.architecture,
            "methods": list(self.config.methods),
            "forms": list(self.config.forms),
            "layers": list(self.layers),
            "roles": list(self.roles),
            "tensors": len(self.tensor_names()),
            "removable_blocks": len(self.topology.blocks),
            "reducible_mlps": len(self.largest_ranks().get(WIDTH, {})),
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
        """Names of all tensors that a point of the space may decompose."""
        named = {name for ranks in self.largest_ranks().values() for name in ranks}
        parts = (*self.topology.matrices, *self.topology.experts)
        return tuple(part.name for part in parts if part.name in named)

    def _rank_listing(self) -> dict[str, list[int]]:
        """Role to its ranks over all methods and layers; role `mlp` to the widths of MLPs."""
        listing: dict[str, set[int]] = {}
        for name in self.largest_ranks().get(WIDTH, {}):
            mlp = self.topology.mlp(name)
            listing.setdefault(mlp.role, set()).update(width_levels(self.config.ranks, mlp))
        for name in self.tensor_names():
            tensor = self.topology.decomposable(name)
            grid = self.config.ranks
            for method, form in itertools.product(self.config.methods, self.config.factor_forms):
                listing.setdefault(tensor.role, set()).update(
                    rank_at(grid, index, tensor, method, form) for index in range(level_count(grid))
                )
        return {role: sorted(ranks) for role, ranks in listing.items()}


def _end(limit: float) -> str:
    return f"{limit:.4g}" if math.isfinite(limit) else "any"


def outside_space(point: DesignPoint, space: SearchSpace, why: str) -> PointError:
    """The error of `levels_of` for a point outside the space."""
    return PointError(f"point {point.id} must be in search space '{space.config.name}', but {why}")
