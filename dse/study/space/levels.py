"""`kind: levels`: every group of tensors is dense or takes one of the rank levels."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dse.config import SearchSpaceConfig
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError
from dse.study.space._base import SearchSpace, check_roles, outside_space
from dse.study.space.rank_grid import level_count, rank_at, saved_parameters
from dse.topology import DecomposableTensor, Topology

__all__ = ["LevelSpace"]

_METHOD = "method"


@dataclass(frozen=True)
class _Group:
    """Tensors that share one choice.

    Attributes:
        name: Dimension name, for example `layers.4-7.attention`.
        label: Name of its role group, "" where roles choose together.
        tensors: Its tensors.
        ranks: Method to level (0 is the first level above dense) to the rank of each tensor; as many levels per method.
    """

    name: str
    label: str
    tensors: tuple[DecomposableTensor, ...]
    ranks: Mapping[str, tuple[tuple[int, ...], ...]]

    def choices(self, method: str, level: int) -> tuple[TensorChoice, ...]:
        """Choice per tensor at a level from 1 upwards."""
        levels = self.ranks[method]
        return tuple(TensorChoice(method, rank) for rank in levels[min(level, len(levels)) - 1])

    def saved(self, method: str, level: int) -> int:
        """Parameters removed at a level; 0 at level 0."""
        return saved_parameters(self.tensors, self.choices(method, level)) if level else 0

    @property
    def level_count(self) -> int:
        """Levels, dense included, of the method that has most."""
        return 1 + max(len(levels) for levels in self.ranks.values())


class LevelSpace(SearchSpace):
    """Independent levels per group of neighbouring layers and roles."""

    def __init__(self, config: SearchSpaceConfig, topology: Topology) -> None:
        super().__init__(config, topology)
        self.groups = tuple(self._make_groups())
        if not self.groups:
            raise ConfigError(
                f"space '{config.name}' must hold at least one tensor of {topology.architecture}, but holds none"
            )

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """One dimension per group, and one for the method where there are several."""
        sizes = {group.name: group.level_count for group in self.groups}
        return {_METHOD: len(self.config.methods), **sizes} if len(self.config.methods) > 1 else sizes

    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The design point of these levels."""
        method = self.config.methods[levels.get(_METHOD, 0)]
        choices: dict[str, TensorChoice] = {}
        for group in self.groups:
            if levels[group.name]:
                chosen = group.choices(method, levels[group.name])
                choices.update({tensor.name: choice for tensor, choice in zip(group.tensors, chosen, strict=True)})
        return DesignPoint.of(choices)

    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """Levels of a point of this space."""
        levels = self.dense_levels
        if point.is_dense:
            return levels
        methods = {choice.method for _, choice in point}
        method = next(iter(methods))
        if len(methods) > 1 or method not in self.config.methods:
            raise outside_space(point, self, f"it uses {sorted(methods)}; the space takes one of {self.config.methods}")
        if _METHOD in levels:
            levels[_METHOD] = self.config.methods.index(method)
        covered: set[str] = set()
        for group in self.groups:
            ranks = tuple(c.rank if (c := point.by_name.get(t.name)) else 0 for t in group.tensors)
            covered.update(tensor.name for tensor in group.tensors)
            if any(ranks):
                if ranks not in group.ranks[method]:
                    known = ", ".join(str(list(r)) for r in group.ranks[method])
                    raise outside_space(point, self, f"'{group.name}' has ranks {list(ranks)}; its levels are {known}")
                levels[group.name] = 1 + group.ranks[method].index(ranks)
        foreign = [name for name, _ in point if name not in covered]
        if foreign:
            raise outside_space(point, self, f"'{foreign[0]}' is not among its tensors")
        return levels

    def number_of_points(self) -> int:
        """Product of the levels, per method; the dense model is counted once."""
        total = 1
        for method in self.config.methods:
            product = 1
            for group in self.groups:
                product *= 1 + len(group.ranks[method])
            total += product - 1
        return total

    def number_of_configurations(self) -> int:
        """Product of the sizes of all dimensions."""
        product = 1
        for size in self.dimensions.values():
            product *= size
        return product

    def reduction_range(self) -> tuple[float, float]:
        """Smallest reduction of one group at one level, and every group at its lowest rank."""
        savings = [
            [[g.saved(m, level) for level in range(1, 1 + len(g.ranks[m]))] for g in self.groups]
            for m in self.config.methods
        ]
        smallest = min(saved for of_method in savings for of_group in of_method for saved in of_group)
        largest = max(sum(max(of_group) for of_group in of_method) for of_method in savings)
        return smallest / self.topology.parameters_dense, largest / self.topology.parameters_dense

    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """The first level of every group."""
        return {
            method: {
                tensor.name: max(ranks[index] for ranks in group.ranks[method])
                for group in self.groups
                for index, tensor in enumerate(group.tensors)
            }
            for method in self.config.methods
        }

    def ladder(self) -> list[dict[str, int]]:
        """Every role group on its own at each of its levels, in all layers; the mildest levels first."""
        labels = dict.fromkeys(group.label for group in self.groups)
        ladder = []
        for level in range(1, max(group.level_count for group in self.groups)):
            for label in labels:
                own = {g.name: min(level, g.level_count - 1) for g in self.groups if g.label == label}
                ladder.append({**self.dense_levels, **own})
        return ladder

    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """Raise groups in random order, each to a random level, until a target between `low` and `high` is met."""
        levels = self.dense_levels
        if _METHOD in levels:
            levels[_METHOD] = generator.randrange(len(self.config.methods))
        method = self.config.methods[levels.get(_METHOD, 0)]
        dense = self.topology.parameters_dense
        target, saved = generator.uniform(low, high) * dense, 0
        order = list(self.groups)
        for sweep in range(2):
            generator.shuffle(order)
            for group in order:
                current = levels[group.name]
                count = len(group.ranks[method])
                # The second sweep lowers ranks further where every group raised once was not enough.
                options = list(range(current + 1, count + 1)) if sweep == 0 or current else []
                fitting = [
                    v for v in options if saved - group.saved(method, current) + group.saved(method, v) <= high * dense
                ]
                if saved >= target or not fitting:
                    continue
                chosen = generator.choice(fitting) if sweep == 0 else fitting[-1]
                saved += group.saved(method, chosen) - group.saved(method, current)
                levels[group.name] = chosen
        return levels

    def _make_groups(self) -> list[_Group]:
        groups = []
        width = self.config.groups.layers
        for start in range(0, len(self.layers), width):
            layers = self.layers[start : start + width]
            span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            for label, roles in self._role_groups():
                tensors = tuple(t for t in self.topology.tensors if t.layer in layers and t.role in roles)
                if tensors:
                    groups.append(self._group(f"layers.{span}" + (f".{label}" if label else ""), label, tensors))
        for tensor in self.topology.tensors:
            if tensor.layer is None and tensor.role in self.roles:
                groups.append(self._group(tensor.name, tensor.role, (tensor,)))
        return groups

    def _role_groups(self) -> list[tuple[str, tuple[str, ...]]]:
        grouping = self.config.groups.roles
        if grouping == "together":
            return [("", self.roles)]
        if grouping == "separate":
            return [(role, (role,)) for role in self.roles]
        assert isinstance(grouping, dict)  # noqa: S101 - the schema allows no other form
        named = [(label, check_roles(roles, self.config.name, self.topology)) for label, roles in grouping.items()]
        everything = [role for _, roles in named for role in roles]
        twice = sorted({role for role in everything if everything.count(role) > 1})
        if twice:
            raise ConfigError(
                f"a role may be in one group of space '{self.config.name}', but '{twice[0]}' is in several"
            )
        return [(label, tuple(role for role in roles if role in self.roles)) for label, roles in named]

    def _group(self, name: str, label: str, tensors: tuple[DecomposableTensor, ...]) -> _Group:
        grid = self.config.ranks
        ranks = {}
        for method in self.config.methods:
            levels = [tuple(rank_at(grid, i, t, method) for t in tensors) for i in range(level_count(grid))]
            ranks[method] = tuple(dict.fromkeys(levels))  # levels that snap to the same ranks are one
        return _Group(name, label, tensors, ranks)
