"""The user's own points: evaluated first, inside or outside the search space."""

from __future__ import annotations

from dse.config import StudyConfig
from dse.cost import check_point, point_cost
from dse.design_point import DesignPoint
from dse.errors import ConfigError, PointError
from dse.search.spaces.base import SearchSpace
from dse.topology import Topology

__all__ = ["checked_user_points"]


def checked_user_points(config: StudyConfig, space: SearchSpace) -> tuple[DesignPoint, ...]:
    """The points of `enqueue`, checked against the model, the space's tensors and its limits.

    The levels and methods of the space, and its `removal`, restrict what a search proposes; the user's points need not
    follow them.

    Raises:
        ConfigError: A point is not applicable, changes a tensor that the space keeps dense, or violates a limit.
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
    held = {tensor for name in space.tensor_names() for tensor in topology.tensors_of(name)}
    for name, _ in point:
        for tensor in map(topology.decomposable, topology.tensors_of(name)):
            if tensor.layer in config.keep_layers:
                reason = f"`keep_layers` {config.keep_layers} keeps layer {tensor.layer} dense"
            elif tensor.role in config.keep_roles:
                reason = f"`keep_roles` {config.keep_roles} keeps {tensor.role} dense"
            elif tensor.name not in held and tensor.name not in _experts_of_block(topology, name):
                reason = f"search space '{config.name}' does not contain {tensor.name}"
            else:
                continue
            raise PointError(
                f"point {point.id} must leave dense what the study keeps dense, but it changes '{name}', and {reason}"
            )


def _experts_of_block(topology: Topology, name: str) -> tuple[str, ...]:
    """Routed experts that are removed with a block; the space need not contain them."""
    return topology.blocks_by_name[name].experts if name in topology.blocks_by_name else ()


def _check_limits(point: DesignPoint, space: SearchSpace) -> None:
    violations = {name: value for name, value in space.violations(point).items() if value > 0}
    if violations and not point.is_dense:
        found = point_cost(space.topology, point)
        raise PointError(
            f"point {point.id} must satisfy the space's limits, but violates "
            + ", ".join(f"{name} by {value:.4g}" for name, value in violations.items())
            + f" (reduction {found.reduction:.4g}, {found.weight_bytes:.4g} weight bytes); change the point or `limits`"
        )
