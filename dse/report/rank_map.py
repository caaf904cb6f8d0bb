"""Rank map of a design point: the rank or width at each layer and role."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dse.cost import factor_parameters
from dse.design_point import REMOVED, DesignPoint, TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.model_parts import DecomposableTensor

__all__ = [
    "OUTSIDE_LAYERS",
    "ModelShape",
    "PlacedChoice",
    "layer_and_role",
    "placed_choices",
    "rank_map_of",
    "rank_map_text",
    "reduction_of",
    "shape_of",
]

ModelShape = Mapping[str, Any]
"""Layout of the model, as a study stores it: `layers` (count), `roles`, `blocks` (block role to the tensor roles
inside), `stacks` (stack role to the roles inside), `mlp` (roles inside an MLP of reducible width, its output last) and
`sizes` (role or tensor name to its shape)."""

OUTSIDE_LAYERS = -1
"""Layer number of tensors outside the layers."""

_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_DENSE = "."


@dataclass(frozen=True)
class PlacedChoice:
    """A choice of a point at one layer and role.

    Attributes:
        name: The tensor, stack or block that the point names.
        choice: Its method and rank.
        parameter_ratio: Fraction of its parameters that remain; None if its size is unknown.
        is_stack: Whether several roles were decomposed as one stacked matrix.
    """

    name: str
    choice: TensorChoice
    parameter_ratio: float | None
    is_stack: bool = False


def layer_and_role(name: str) -> tuple[int, str]:
    """Layer and role of a tensor or block; `OUTSIDE_LAYERS` and the name itself outside the layers."""
    matched = _NAME.fullmatch(name)
    return (int(matched[1]), matched[2]) if matched else (OUTSIDE_LAYERS, name)


def placed_choices(point: DesignPoint, shape: ModelShape) -> dict[tuple[int, str], PlacedChoice]:
    """(layer, role) to the choice there; dense tensors are left out."""
    found: dict[tuple[int, str], PlacedChoice] = {}
    for name, choice in point:
        layer, role = layer_and_role(name)
        if choice.is_removal:
            members = shape["blocks"].get(role, [role])
            placed = PlacedChoice(name, choice, 0.0)
        elif choice.is_width:
            members = shape.get("mlp") or [role]
            placed = PlacedChoice(name, choice, _width_ratio(layer, members[-1], choice, shape))
        else:
            members = shape["stacks"].get(role, [role])
            placed = PlacedChoice(name, choice, _parameter_ratio(layer, members, choice, shape), len(members) > 1)
        found |= {(layer, member): placed for member in members}
    return found


def _parameter_ratio(layer: int, roles: Sequence[str], choice: TensorChoice, shape: ModelShape) -> float | None:
    """Parameters of the factors / parameters of the tensors that they replace."""
    sizes = shape.get("sizes", {})
    names = [role if layer == OUTSIDE_LAYERS else f"layers.{layer}.{role}" for role in roles]
    found = [sizes.get(name) or sizes.get(role) for name, role in zip(names, roles, strict=True)]
    if any(size is None for size in found):
        return None
    if len(found[0]) == 3:
        experts, rows, columns = found[0]
        fused = ExpertTensor("part", "part", "part", layer, roles[0], experts, rows, columns, 1)
        return factor_parameters(fused, choice) / fused.parameters
    rows, columns = sum(size[0] for size in found), found[0][1]
    tensor = DecomposableTensor("part", "part", None, "part", rows, columns)
    return factor_parameters(tensor, choice) / tensor.parameters


def _width_ratio(layer: int, output: str, choice: TensorChoice, shape: ModelShape) -> float | None:
    """Channels that an MLP keeps / its channels, which are the columns of its output matrix."""
    sizes = shape.get("sizes", {})
    size = sizes.get(f"layers.{layer}.{output}") or sizes.get(output)
    return None if size is None else choice.rank / size[1]


def reduction_of(point: DesignPoint, shape: ModelShape, parameters_dense: float | None) -> float | None:
    """Fraction of all parameters that a point removes, from the model's layout; None if a size is unknown.

    Args:
        point: The point.
        shape: Layout of the model.
        parameters_dense: Parameters of the dense model; None if unknown.
    """
    sizes = shape.get("sizes", {})
    removed = 0.0
    for (layer, role), placed in placed_choices(point, shape).items():
        name = role if layer == OUTSIDE_LAYERS else f"layers.{layer}.{role}"
        size = sizes.get(name) or sizes.get(role)
        if size is None or placed.parameter_ratio is None:
            return None
        removed += math.prod(size) * (1.0 - placed.parameter_ratio)
    return removed / parameters_dense if parameters_dense else None


def rank_map_of(point: DesignPoint, shape: ModelShape) -> dict[int, dict[str, str]]:
    """Layer to role to rank, after `p` for pivoted factors; `w` and the channels kept in an MLP of reduced width,
    `removed` in a removed block, `.` if dense.
    """
    columns = [*shape["roles"]]
    found: dict[int, dict[str, str]] = {layer: dict.fromkeys(columns, _DENSE) for layer in range(shape["layers"])}
    for (layer, role), placed in placed_choices(point, shape).items():
        row = found.setdefault(layer, dict.fromkeys(columns, _DENSE))
        row[role] = _entry(placed.choice)
    return dict(sorted(found.items()))


def _entry(choice: TensorChoice) -> str:
    if choice.is_removal:
        return REMOVED
    return f"{'w' if choice.is_width else 'p' if choice.is_pivoted else ''}{choice.rank}"


def rank_map_text(ranks: Mapping[int, Mapping[str, str]]) -> list[str]:
    """The rank map as aligned text, one line per layer."""
    columns = list(dict.fromkeys(role for row in ranks.values() for role in row))
    width = max([len(REMOVED), *(len(role) for role in columns)])
    lines = ["layer " + " ".join(f"{role:>{width}}" for role in columns)]
    for layer, row in ranks.items():
        label = "other" if layer == OUTSIDE_LAYERS else str(layer)
        lines.append(f"{label:>5} " + " ".join(f"{row.get(role, _DENSE):>{width}}" for role in columns))
    return lines


def shape_of(facts: Mapping[str, Any], points: Sequence[DesignPoint]) -> ModelShape:
    """The model's layout from the study's stored facts; for studies without it, as far as their points name it."""
    stored: ModelShape | None = facts.get("shape")
    if stored:
        return stored
    parts = [layer_and_role(name) for point in points for name, _ in point]
    inside = [(layer, role) for layer, role in parts if layer != OUTSIDE_LAYERS]
    roles = list(dict.fromkeys(role for _, role in inside))
    return {"layers": 1 + max((layer for layer, _ in inside), default=-1), "roles": roles, "blocks": {}, "stacks": {}}
