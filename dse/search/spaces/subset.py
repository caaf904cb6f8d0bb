"""`kind: subset`: a set of layers x a set of roles x one rank, the space of Moar et al. (2024)."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TypeVar

from dse.config import SearchSpaceConfig
from dse.cost import parameters_saved
from dse.design_point import DesignPoint, TensorChoice
from dse.model_parts import DecomposableTensor
from dse.search.spaces.base import SearchSpace, outside_space
from dse.search.spaces.rank_levels import level_count, nearest_method, rank_at, saved_by_tensor, saved_parameters
from dse.topology import Topology

__all__ = ["SubsetSpace"]

_METHOD, _RANK = "method", "rank"

_MemberT = TypeVar("_MemberT")


class SubsetSpace(SearchSpace):
    """The chosen roles of the chosen layers are decomposed at one rank; everything else stays dense.

    With L layers, K tensors per layer and R ranks, the paper counts 2^L x 2^K x R configurations: 2^39 for the 32
    layers and 7 tensors of Llama-2-7B at rank 1. Configurations without a layer or without a tensor are all the dense
    model.
    """

    def __init__(self, config: SearchSpaceConfig, topology: Topology) -> None:
        super().__init__(config, topology)
        self.roles = tuple(role for role in self.roles if role in topology.roles)
        self._level_count = level_count(config.ranks)
        self._check_not_empty(self._everything, "layers or roles")

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """A switch per layer and per role, the rank and the method if there are several."""
        sizes = {f"layers.{layer}": 2 for layer in self.layers} | {f"roles.{role}": 2 for role in self.roles}
        if self._level_count > 1:
            sizes[_RANK] = self._level_count
        if len(self.config.methods) > 1:
            sizes[_METHOD] = len(self.config.methods)
        return sizes

    def point(self, levels: Mapping[str, int]) -> DesignPoint:
        """The design point of these levels."""
        layers = {layer for layer in self.layers if levels[f"layers.{layer}"]}
        roles = {role for role in self.roles if levels[f"roles.{role}"]}
        method = self.config.methods[levels.get(_METHOD, 0)]
        chosen = self._tensors(layers, roles)
        return DesignPoint.of({t.name: self._choice(t, method, levels.get(_RANK, 0)) for t in chosen})

    def levels_of(self, point: DesignPoint) -> dict[str, int]:
        """Levels of a point of this space."""
        levels = self.dense_levels
        if point.is_dense:
            return levels
        tensors = [self.topology.part(name) for name, _ in point]
        levels.update({f"layers.{t.layer}": 1 for t in tensors if f"layers.{t.layer}" in levels})
        levels.update({f"roles.{t.role}": 1 for t in tensors if f"roles.{t.role}" in levels})
        for index in range(len(self.config.methods)):
            for rank in range(self._level_count):
                candidate = levels | {k: v for k, v in ((_METHOD, index), (_RANK, rank)) if k in levels}
                if self.point(candidate) == point:
                    return candidate
        raise outside_space(
            point, self, "it is not one method and rank over a set of layers times a set of roles of the space"
        )

    def _nearest(self, point: DesignPoint) -> dict[str, int]:
        """The layers and roles that the point changes, at the rank with the most similar savings."""
        saved = saved_by_tensor(self.topology, point)
        touched = [self.topology.decomposable(name) for name in saved]
        levels = self.dense_levels | {f"layers.{t.layer}": 1 for t in touched} | {f"roles.{t.role}": 1 for t in touched}
        levels = {name: levels[name] for name in self.dimensions}
        if _METHOD in levels:
            levels[_METHOD] = nearest_method(point, self.config.methods)

        def distance(rank: int) -> float:
            found = saved_by_tensor(self.topology, self.point({**levels, _RANK: rank}))
            return sum(abs(found.get(name, 0.0) - saved.get(name, 0.0)) for name in {*found, *saved})

        return levels | ({_RANK: min(range(self._level_count), key=distance)} if _RANK in levels else {})

    def number_of_points(self) -> int:
        """Non-empty layer sets x non-empty role sets x distinct ranks x methods, and the dense model.

        Layers with the same roles and shapes are interchangeable, so the sets are counted per type of layer.
        """
        types = Counter(
            tuple((t.role, t.shape) for t in self._tensors({layer}, set(self.roles))) for layer in self.layers
        )
        total = 1
        for roles in _subsets(self.roles):
            for chosen in _subsets(tuple(layer_type for layer_type in types if layer_type)):
                present = [{role for role, _ in layer_type} & set(roles) for layer_type in chosen]
                # Layers without these roles, or roles in none of these layers, yield points that are counted elsewhere.
                if not all(present) or set().union(*present) != set(roles):
                    continue
                layer_sets = math.prod(2 ** types[layer_type] - 1 for layer_type in chosen)
                shapes = {shape for layer_type in chosen for role, shape in layer_type if role in roles}
                total += layer_sets * sum(self._distinct_levels(shapes, method) for method in self.config.methods)
        return total

    def _distinct_levels(self, shapes: set[tuple[int, int]], method: str) -> int:
        """Number of distinct rank levels for tensors of these shapes; ranks are capped at break-even."""
        probes = [DecomposableTensor("probe", "probe", 0, "probe", *shape) for shape in sorted(shapes)]
        ranks = {tuple(rank_at(self.config.ranks, i, t, method) for t in probes) for i in range(self._level_count)}
        return len(ranks)

    def number_of_configurations(self) -> int:
        """2^layers x 2^roles x ranks x methods, as counted in the paper."""
        subsets: int = 2 ** (len(self.layers) + len(self.roles))
        return subsets * self._level_count * len(self.config.methods)

    def reduction_range(self) -> tuple[float, float]:
        """The reductions of one tensor at the highest rank, and of all tensors at the lowest."""
        everything, last = self._everything, self._level_count - 1
        single = min(
            saved_parameters([t], [self._choice(t, method, level)])
            for t in everything
            for method in self.config.methods
            for level in range(self._level_count)
        )
        most = max(
            saved_parameters(everything, [self._choice(t, method, last) for t in everything])
            for method in self.config.methods
        )
        return single / self.topology.parameters_dense, most / self.topology.parameters_dense

    def largest_ranks(self) -> dict[str, dict[str, int]]:
        """The highest rank for every tensor."""
        methods = self.config.methods
        return {method: {t.name: self._choice(t, method, 0).rank for t in self._everything} for method in methods}

    def _draw(self, generator: random.Random, low: float, high: float) -> dict[str, int]:
        """A random set of roles and a rank; then layers in random order until a target is reached."""
        levels = self.dense_levels
        for name in (_METHOD, _RANK):
            if name in levels:
                levels[name] = generator.randrange(self.dimensions[name])
        roles = [role for role in self.roles if generator.random() < 0.5] or list(self.roles)
        levels.update({f"roles.{role}": 1 for role in roles})
        target, saved = generator.uniform(low, high), 0.0
        for layer in generator.sample(self.layers, len(self.layers)):
            others = {k: v for k, v in levels.items() if not k.startswith("layers.")}
            alone = self.point({**self.dense_levels, **others, f"layers.{layer}": 1})
            step = parameters_saved(self.topology, alone) / self.topology.parameters_dense
            if saved and (saved >= target or saved + step > high):
                break
            levels[f"layers.{layer}"] = 1
            saved += step
        return levels

    @cached_property
    def _everything(self) -> list[DecomposableTensor]:
        """All tensors that the space may decompose."""
        return self._tensors(set(self.layers), set(self.roles))

    def _tensors(self, layers: set[int], roles: set[str]) -> list[DecomposableTensor]:
        return [t for t in self.topology.tensors if t.layer in layers and t.role in roles]

    def _choice(self, tensor: DecomposableTensor, method: str, level: int) -> TensorChoice:
        return TensorChoice(method, rank_at(self.config.ranks, level, tensor, method))


def _subsets(members: tuple[_MemberT, ...]) -> Iterator[tuple[_MemberT, ...]]:
    """All non-empty subsets."""
    for size in range(1, len(members) + 1):
        yield from itertools.combinations(members, size)
