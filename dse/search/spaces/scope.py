"""The layers and roles that a search space may change, checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from dse.config import LayerRange, SearchSpaceConfig
from dse.decomposition import METHODS
from dse.errors import ConfigError, did_you_mean
from dse.expert_tensor import EXPERT_ROLES
from dse.topology import Topology

__all__ = ["KNOWN_ROLES", "check_roles", "layers_of_space", "roles_of_space"]

KNOWN_ROLES = (
    "query", "key", "value", "query_key_value", "attention_output",
    "gate", "up", "gate_up", "down", "intermediate", "output", *EXPERT_ROLES,
)  # fmt: skip
"""Roles of all architectures; a space may name roles that a model does not have."""


def layers_of_space(config: SearchSpaceConfig, topology: Topology) -> tuple[int, ...]:
    """The layers that may change: the `layers` of the space without its `keep_layers`.

    Raises:
        ConfigError: A layer is not in the model, or no layer remains.
    """
    _check_layers(config.keep_layers, f"`keep_layers` of space '{config.name}'", topology)
    chosen = tuple(layer for layer in _named_layers(config, topology) if layer not in config.keep_layers)
    return chosen or _refuse("layer", config.keep_layers, config)


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
    _check_layers(config.layers, f"space '{config.name}'", topology)
    if not config.layers:
        raise ConfigError(f"`layers` of space '{config.name}' must name at least one layer, but is empty")
    return tuple(sorted(set(config.layers)))


def _check_layers(layers: Sequence[int], where: str, topology: Topology) -> None:
    for layer in layers:
        if layer not in range(topology.layer_count):
            raise ConfigError(
                f"`0 <= layer < {topology.layer_count}` must hold for {topology.architecture}, but {where} names layer"
                f" {layer}"
            )


def _refuse(what: str, kept: Sequence[object], config: SearchSpaceConfig) -> NoReturn:
    """Report that `keep_layers` or `keep_roles` leaves nothing to change."""
    raise ConfigError(
        f"constraints must leave room for a point, but `keep_{what}s` {kept} of space '{config.name}'"
        f" keeps every {what} in `{what}s` dense; name fewer"
    )


def roles_of_space(config: SearchSpaceConfig, topology: Topology) -> tuple[str, ...]:
    """The roles that may change: the `roles` of the space without its `keep_roles`.

    Raises:
        ConfigError: A role is unknown, expert roles are not supported here, or no role remains.
    """
    kept = check_roles(config.keep_roles, config.name, topology)
    chosen = tuple(role for role in _named_roles(config, topology) if role not in kept)
    return chosen or _refuse("role", config.keep_roles, config)


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
    _check_expert_roles(config, present)
    return present


def _check_expert_roles(config: SearchSpaceConfig, roles: Sequence[str]) -> None:
    """Fused expert tensors are decomposed by `tucker`, in `levels` spaces without refit methods."""
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
    """The roles of this list that the model has.

    Args:
        space_name: Name of the space, for messages.
        stacks: Whether roles of stacks count.

    Raises:
        ConfigError: No architecture has a role of this name.
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
