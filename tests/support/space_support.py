"""Small random search spaces that tests compare with brute force."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from topologies import topology_of_shapes

from dse.config import parse_search_space
from dse.design_point import METHOD_NAMES, DesignPoint
from dse.errors import ConfigError
from dse.model_parts import RemovableBlock, TensorStack
from dse.search.spaces.base import SearchSpace
from dse.topology import Topology


def space_of(topology: Topology, *, check: bool = True, **config: Any) -> SearchSpace:
    """A search space; by default of kind `levels` with SVD at rank 1, and checked against the topology."""
    parsed = parse_search_space({"name": "s", "methods": ["svd"], "ranks": {"absolute": [1]}, **config})
    if check:
        return SearchSpace.from_config(parsed, topology)
    from dse.search.spaces import SPACES

    return SPACES[parsed.kind](parsed, topology)


def all_points(space: SearchSpace) -> dict[str, DesignPoint]:
    """Id to point, for all points of the space."""
    names, sizes = list(space.dimensions), list(space.dimensions.values())
    points = {}
    for levels in itertools.product(*map(range, sizes)):
        point = space.point(dict(zip(names, levels, strict=True)))
        points[point.id] = point
    return points


UNIFORM = topology_of_shapes([{"query": (6, 6), "key": (3, 6), "up": (12, 6)}] * 3)
UNEVEN = topology_of_shapes([{"query": (6, 6), "up": (12, 6)}, {"query": (6, 6)}, {"up": (4, 9), "down": (5, 5)}])


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    roles = draw(st.lists(st.sampled_from(["query", "key", "up", "down"]), min_size=1, max_size=3, unique=True))
    size = st.integers(3, 12)  # below 3 even rank 1 with a core saves nothing
    shapes = {role: (draw(size), draw(size)) for role in roles}
    layers = [dict(shapes) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):  # layers of several types: a role is missing or has another shape
        for layer in layers[1:]:
            for role in roles:
                action = draw(st.sampled_from(["keep", "keep", "drop", "reshape"]))
                if action == "drop" and len(layer) > 1:
                    del layer[role]
                elif action == "reshape" and role in layer:
                    layer[role] = (draw(size), draw(size))
    outside = {"head": (draw(size), draw(size))} if draw(st.booleans()) else None
    return topology_of_shapes(layers, outside, other=draw(st.integers(0, 200)))


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Topology, dict[str, Any]]:
    topology = draw(topologies())
    kind = draw(st.sampled_from(["levels", "subset"]))
    config: dict[str, Any] = {
        "kind": kind,
        "methods": draw(st.lists(st.sampled_from(METHOD_NAMES), min_size=1, max_size=2, unique=True)),
        "ranks": draw(
            st.fixed_dictionaries(
                {
                    "absolute": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
                    "multiple": st.sampled_from([1, 1, 2]),
                }
            )
            | st.fixed_dictionaries(
                {
                    "kept_fractions": st.lists(st.floats(0.05, 1), min_size=1, max_size=3, unique=True),
                    "multiple": st.sampled_from([1, 2, 3]),
                }
            )
        ),
    }
    if kind == "levels":
        grouping = draw(st.sampled_from(["together", "separate", "named"]))
        named = {"a": ["query", "key"], "b": ["up"]}
        config["groups"] = {"layers": draw(st.integers(1, 3)), "roles": named if grouping == "named" else grouping}
    if draw(st.booleans()):
        config["layers"] = draw(st.lists(st.integers(0, topology.layer_count - 1), min_size=1, unique=True))
    if draw(st.booleans()):
        config["roles"] = draw(
            st.lists(st.sampled_from(sorted({t.role for t in topology.tensors})), min_size=1, unique=True)
        )
    return topology, config


def small_space(drawn: tuple[Topology, dict[str, Any]]) -> SearchSpace:
    """The space, if it has a tensor and is small enough to list."""
    try:
        space = space_of(drawn[0], check=False, **drawn[1])
    except ConfigError as error:
        assume("must hold at least one tensor" not in str(error))
        raise
    assume(space.number_of_configurations() <= 1500)
    return space


BRUTE = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


# --- stacks and removable blocks --------------------------------------------------------------------------------------

GROUPS: list[Any] = ["together", "separate", {"attention": ["query", "key"], "mlp": ["up"]}, {"part": ["query"]}]


def structured(layers: int, kinds: list[str], *, rest: int, stacked: bool, widths: list[int]) -> Topology:
    """Layers of query, key and up tensors in blocks; `widths` makes the layers differ."""
    shapes = [{"query": (6, 8), "key": (4, 8), "up": (widths[i], 8)} for i in range(layers)]
    topology = topology_of_shapes(shapes, other=400)
    by_name, blocks = topology.by_name, []
    for i in range(layers):
        for role, inside in (("attention", ("query", "key")), ("mlp", ("up",))):
            tensors = tuple(f"layers.{i}.{tensor}" for tensor in inside)
            size = sum(by_name[name].parameters for name in tensors)
            is_attention = role == "attention"
            blocks.append(
                RemovableBlock(
                    f"layers.{i}.{role}", f"m.{i}.{role}", i, role, f"m.{i}", tensors, (), size + 5, size,
                    rest_parameters=rest,
                    cache_module=f"m.{i}.{role}" if is_attention else "",
                    cache_kind=kinds[i] if is_attention else "",
                )
            )  # fmt: skip
    role = "query_key_value"
    members = [(by_name[f"layers.{i}.query"], by_name[f"layers.{i}.key"]) for i in range(layers)]
    stacks = tuple(TensorStack(f"layers.{i}.{role}", i, role, members[i]) for i in range(layers))
    return dataclasses.replace(topology, blocks=tuple(blocks), stacks=stacks if stacked else ())


@st.composite
def structured_spaces(draw: st.DrawFn) -> SearchSpace:
    layers = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(["full", "window"]), min_size=layers, max_size=layers))
    widths = draw(st.lists(st.sampled_from([4, 9]), min_size=layers, max_size=layers))
    topology = structured(layers, kinds, rest=draw(st.sampled_from([0, 3])), stacked=draw(st.booleans()), widths=widths)
    config = {
        "methods": draw(st.sampled_from([["svd"], ["tucker", "svd"]])),
        "ranks": {"absolute": draw(st.lists(st.integers(1, 4), min_size=1, max_size=2, unique=True))},
        "groups": {"layers": draw(st.integers(1, 2)), "roles": draw(st.sampled_from(GROUPS))},
        "stacks": draw(st.booleans()),
        "removal": draw(st.booleans()),
    }
    space = space_of(topology, check=False, **config)
    assume(space.number_of_configurations() <= 2000)
    return space


def small(**changes: Any) -> Topology:
    return structured(2, ["full", "full"], **({"rest": 3, "stacked": True, "widths": [9, 9]} | changes))
