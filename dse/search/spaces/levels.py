"""`kind: levels`: each group of tensors is dense or at one of the rank levels."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from functools import cached_property

from dse.config import SearchSpaceConfig
from dse.cost import parameters_saved
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError
from dse.expert_tensor import EXPERT_ROLES
from dse.model_parts import Decomposable
from dse.search.spaces.base import SearchSpace, outside_space
from dse.search.spaces.level_group import Group, matrices_of, stacked_roles, whole_blocks, whole_mlps
from dse.search.spaces.rank_levels import nearest_method, saved_by_tensor, saved_in_parts
from dse.search.spaces.scope import check_roles
from dse.topology import Topology

__all__ = ["LevelSpace"]

_METHOD = "method"


class LevelSpace(SearchSpace):
    """Independent levels for each group of adjacent layers and roles."""

    def __init__(self, config: SearchSpaceConfig, topology: Topology) -> None:
        super().__init__(config, topology)
        self.groups = tuple(self._make_groups())
        self._check_not_empty(self.groups, "layers, roles or groups")

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """One dimension per group, and one for the method if there are several."""
        sizes = {group.name: group.level_count for group in self.groups}
        return {_METHOD: len(self.config.methods), **sizes} if len(self.config.methods) > 1 else sizes

    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The design point of these levels."""
        method = self.config.methods[levels.get(_METHOD, 0)]
        spared = self._spared(levels)
        choices: dict[str, TensorChoice] = {}
        for group in self.groups:
            level = levels[group.name]
            if level:
                choices |= group.choices(method, level - 1 if group.name in spared else level)
        return DesignPoint.of(choices)

    def _spared(self, levels: Mapping[str, int]) -> set[str]:
        """Groups that take their last ranks instead of being removed, so that attention of every kind remains.

        If the levels would remove all attention of a kind, the last group of that kind stays.
        """
        kinds = self._groups_by_kind.values()
        return {groups[-1].name for groups in kinds if all(group.removes(levels[group.name]) for group in groups)}

    @cached_property
    def _groups_by_kind(self) -> dict[str, list[Group]]:
        """Kind of attention to its groups, for kinds whose groups together can remove all attention of the kind."""
        kinds: dict[str, list[Group]] = {}
        for kind in {block.cache_kind for block in self.topology.blocks if block.role == "attention"}:
            own = {b.name for b in self.topology.blocks if b.role == "attention" and b.cache_kind == kind}
            groups = [group for group in self.groups if own & {block.name for block in group.blocks}]
            if own == own & {block.name for group in groups for block in group.blocks}:
                kinds[kind] = groups
        return kinds

    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """Levels of a point of this space."""
        levels = self.dense_levels
        if point.is_dense:
            return levels
        experts = self.topology.experts_by_name
        if truncated := [name for name, choice in point if choice.expert_rank]:
            raise outside_space(point, self, f"it truncates the expert mode of '{truncated[0]}'")
        methods = {choice.method for name, choice in point.decomposed if name not in experts}
        method = next(iter(methods), self.config.methods[0])
        if len(methods) > 1 or method not in self.config.methods:
            raise outside_space(point, self, f"it uses {sorted(methods)}; the space takes one of {self.config.methods}")
        if _METHOD in levels:
            levels[_METHOD] = self.config.methods.index(method)
        covered: set[str] = set()
        for group in self.groups:
            own = {name: point.by_name[name] for name in group.names if name in point.by_name}
            removed = [name for name, choice in own.items() if choice.is_removal]
            covered.update(own)
            if removed and len(removed) == len(group.blocks) == len(own):
                levels[group.name] = group.level_count - 1
            elif removed:
                raise outside_space(point, self, f"of '{group.name}' it removes {removed} only; the space removes all")
            elif own:
                if own not in group.forms[method]:
                    known = " | ".join(_text(form) for form in group.forms[method])
                    raise outside_space(point, self, f"'{group.name}' has {_text(own)}; its levels are {known}")
                levels[group.name] = 1 + group.forms[method].index(own)
        foreign = [name for name, _ in point if name not in covered]
        if foreign:
            raise outside_space(point, self, f"'{foreign[0]}' is not among its tensors")
        return levels

    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """For each group the level whose savings are nearest to those of its tensors in the point."""
        index = nearest_method(point, self.config.methods)
        method, saved = self.config.methods[index], saved_by_tensor(self.topology, point)
        levels = {_METHOD: index} if _METHOD in self.dimensions else {}
        for group in self.groups:
            target = saved_in_parts(self.topology, saved, (matrix.name for matrix in group.matrices))
            options = (0, *group.levels(method))
            levels[group.name] = min(options, key=lambda level: abs(group.saved(method, level) - target))
        return levels

    def number_of_points(self) -> int:
        """Product of the levels for each method; points without decomposed tensors are counted once.

        Levels that would remove all attention of a kind are not counted: other levels yield the same points.
        """
        total = self._combinations(None)
        for method in self.config.methods:
            total += self._combinations(method) - self._combinations(None)
        return total

    def _combinations(self, method: str | None) -> int:
        """Number of points of one method; for None, of points whose groups are dense, removed, or experts."""
        total = 0
        for size in range(len(self._groups_by_kind) + 1):
            for kinds in itertools.combinations(self._groups_by_kind.values(), size):
                gone = {group.name for groups in kinds for group in groups}
                others = [group for group in self.groups if group.name not in gone]
                levels = [1 + self._level_count(group, method) for group in others]
                total += (-1) ** size * math.prod(levels)
        return total

    def _level_count(self, group: Group, method: str | None) -> int:
        """Number of distinct levels of a group above dense; for method None, of levels without decomposition."""
        if method is None and not group.is_experts:
            return bool(group.blocks)
        return len(group.levels(method or self.config.methods[0]))

    def number_of_configurations(self) -> int:
        """Product of the sizes of all dimensions."""
        return math.prod(self.dimensions.values())

    def reduction_range(self) -> tuple[float, float]:
        """The smallest reduction of one group at one level, and the reduction of all groups at their deepest levels."""
        smallest = min(
            group.saved(method, level)
            for method in self.config.methods
            for group in self.groups
            for level in group.levels(method)
        )
        largest = max(
            parameters_saved(self.topology, self.point(self._most_saving(index)))
            for index in range(len(self.config.methods))
        )
        return smallest / self.topology.parameters_dense, largest / self.topology.parameters_dense

    def _most_saving(self, method_index: int) -> dict[str, int]:
        """All groups at their deepest levels under one method, with attention of every kind remaining."""
        method = self.config.methods[method_index]
        best = {group.name: group.deepest_level(method) for group in self.groups}
        rest = {block.layer: block.rest_parameters for block in self.topology.blocks}

        def loss(group: Group) -> int:
            """Parameters that are kept if the group takes its last ranks instead of being removed."""
            kept = group.saved(method, best[group.name]) - group.saved(method, best[group.name] - 1)
            return kept + sum(rest[layer] for layer in {block.layer for block in group.blocks})

        candidates = [
            {group.name: group for group in chosen}
            for chosen in itertools.product(*self._groups_by_kind.values())
            if all(group.removes(best[group.name]) for group in chosen)
        ]
        spared = min(candidates, key=lambda groups: sum(map(loss, groups.values())), default={})
        levels = {name: level - 1 if name in spared else level for name, level in best.items()}
        return levels | ({_METHOD: method_index} if len(self.config.methods) > 1 else {})

    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """The largest rank or width of every part of a group."""
        found: dict[str, dict[str, int]] = {}
        for method in self.config.methods:
            for form in (form for group in self.groups for form in group.forms[method]):
                for name, choice in form.items():
                    ranks = found.setdefault(choice.method, {})
                    ranks[name] = max(choice.rank, ranks.get(name, 0))
        return found

    def uniform_points(self) -> list[dict[str, int]]:
        """Each role group alone at each of its levels in all layers; higher ranks first."""
        labels = dict.fromkeys(group.label for group in self.groups)
        points = []
        for level in range(1, max(group.level_count for group in self.groups)):
            for label in labels:
                own = {g.name: min(level, g.level_count - 1) for g in self.groups if g.label == label}
                points.append({**self.dense_levels, **own})
        return points

    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """Raise groups in random order, each to a random level, until a target between `low` and `high` is reached."""
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
                # The second sweep lowers ranks further if raising every group once was not enough.
                options = [v for v in group.levels(method) if v > current] if sweep == 0 or current else []
                fitting = [
                    v for v in options if saved - group.saved(method, current) + group.saved(method, v) <= high * dense
                ]
                if saved >= target or not fitting:
                    continue
                chosen = generator.choice(fitting) if sweep == 0 else fitting[-1]
                saved += group.saved(method, chosen) - group.saved(method, current)
                levels[group.name] = chosen
        return levels

    def _make_groups(self) -> list[Group]:
        groups = []
        width = self.config.groups.layers
        for start in range(0, len(self.layers), width):
            layers = self.layers[start : start + width]
            span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            for label, roles in self._role_groups():
                matrices = matrices_of(self.topology, layers, roles, stacks=self.config.stacks)
                if matrices:
                    groups.append(self._group(f"layers.{span}" + (f".{label}" if label else ""), label, matrices))
        for tensor in self.topology.tensors:
            if tensor.layer is None and tensor.role in self.roles:
                groups.append(self._group(tensor.name, tensor.role, (tensor,)))
        return groups

    def _role_groups(self) -> list[tuple[str, tuple[str, ...]]]:
        grouping = self.config.groups.roles
        if grouping == "together":
            return [("", self.roles)]
        if isinstance(grouping, str):  # "separate"
            roles = stacked_roles(self.topology, self.roles) if self.config.stacks else self.roles
            return [(role, (role,)) for role in roles]
        named = [
            (label, check_roles(roles, self.config.name, self.topology, stacks=self.config.stacks))
            for label, roles in grouping.items()
        ]
        everything = [role for _, roles in named for role in roles]
        twice = sorted({role for role in everything if everything.count(role) > 1})
        if twice:
            raise ConfigError(
                f"a role may be in one group of space '{self.config.name}', but '{twice[0]}' is in several; keep one"
            )
        kept = [(label, tuple(role for role in roles if role in self.roles)) for label, roles in named]
        self._check_stacks(dict(kept))
        return kept

    def _check_stacks(self, groups: Mapping[str, tuple[str, ...]]) -> None:
        """Refuse a stack in one group and its members in another, which would decompose the members twice."""
        for stack in self.topology.stacks if self.config.stacks else ():
            own = {member.role for member in stack.members}
            split = [label for label, roles in groups.items() if stack.role not in roles and own & set(roles)]
            if split and any(stack.role in roles for roles in groups.values()):
                raise ConfigError(
                    f"a stack and its members must be in one group of space '{self.config.name}', but"
                    f" '{stack.role}' and {', '.join(sorted(own))} are in several; move them into one"
                )

    def _group(self, name: str, label: str, matrices: tuple[Decomposable, ...]) -> Group:
        config = self.config
        with_experts = any(role in EXPERT_ROLES for role in self.roles)
        blocks = whole_blocks(self.topology, matrices, with_experts=with_experts) if config.removal else ()
        mlps = whole_mlps(self.topology, matrices) if config.widths else ()
        return Group.of(name, label, matrices, config.methods, config.factor_forms, config.ranks, mlps, blocks)


def _text(form: Mapping[str, TensorChoice]) -> str:
    """The choices of a level for messages: `[8, 8, 16]`, or `width [1016]`."""
    kind = "width " if any(choice.is_width for choice in form.values()) else ""
    kind += "pivoted " if any(choice.is_pivoted for choice in form.values()) else ""
    return kind + str([choice.rank for _, choice in sorted(form.items())])
