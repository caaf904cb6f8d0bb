"""The user's own points: evaluated first, whether or not the space has levels for them."""

from __future__ import annotations

from collections.abc import Iterable

from dse.config import StudyConfig
from dse.cost import check_point, cost
from dse.design_point import DesignPoint
from dse.errors import ConfigError, PointError
from dse.search.spaces.base import SearchSpace
from dse.topology import Topology

__all__ = ["own_points"]


def own_points(config: StudyConfig, space: SearchSpace) -> tuple[DesignPoint, ...]:
    """The points of `enqueue`, checked against the model, the space's tensors and its constraints.

    Its levels, its methods and `removal` say what a search proposes; a point of the user's own need not keep to them.

    Raises:
        ConfigError: A point cannot be applied, touches what the space leaves alone, or breaks a limit.
    """
    points = []
    for index, entry in enumerate(config.enqueue):
        try:
            point = DesignPoint.from_json(entry, space.topology)
            check_point(space.topology, point)
            _check_tensors(point, space)
            _check_limits(point, space)
        except PointError as error:
            raise ConfigError(f"`enqueue.{index}`: {error}") from error
        points.append(point)
    return tuple(points)


def _check_tensors(point: DesignPoint, space: SearchSpace) -> None:
    topology, config = space.topology, space.config
    held = set(_tensors(space, space.tensor_names()))
    for name, _ in point:
        for tensor in map(topology.decomposable, topology.tensors_of(name)):
            if tensor.layer in config.keep_layers:
                why = f"`keep_layers` {config.keep_layers} keeps layer {tensor.layer} dense"
            elif tensor.role in config.keep_roles:
                why = f"`keep_roles` {config.keep_roles} keeps {tensor.role} dense"
            elif tensor.name not in held and tensor.name not in _experts_beside(topology, name):
                why = f"search space '{config.name}' does not hold {tensor.name}"
            else:
                continue
            raise PointError(f"point {point.id} must leave alone what the study does, but names '{name}', and {why}")


def _experts_beside(topology: Topology, name: str) -> tuple[str, ...]:
    """Routed experts that go with a removed block, though no space need hold them."""
    return topology.blocks_by_name[name].experts if name in topology.blocks_by_name else ()


def _tensors(space: SearchSpace, names: Iterable[str]) -> Iterable[str]:
    return (tensor for name in names for tensor in space.topology.tensors_of(name))


def _check_limits(point: DesignPoint, space: SearchSpace) -> None:
    broken = {name: value for name, value in space.violations(point).items() if value > 0}
    if broken and not point.is_dense:
        found = cost(space.topology, point)
        raise PointError(
            f"point {point.id} must keep the space's limits, but breaks "
            + ", ".join(f"{name} by {value:.4g}" for name, value in broken.items())
            + f" (reduction {found.reduction:.4g}, {found.weight_bytes:.4g} weight bytes); change the point or `limits`"
        )
