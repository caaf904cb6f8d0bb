"""What stands at each layer and role of a point, from its record and the shape that the study keeps of its model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dse.cost import factor_parameters
from dse.design_point import TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.topology import DecomposableTensor
from dse.trial_record import TrialRecord

__all__ = ["OTHER", "Placed", "layer_and_role", "placed_choices", "rank_map_of", "rank_map_text", "shape_of"]

OTHER = -1
"""Stands for the layer of what lies outside the layers."""

_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_DENSE, _GONE = ".", "gone"


@dataclass(frozen=True)
class Placed:
    """A choice where it takes effect.

    Attributes:
        name: What the point names: a tensor, a stack or a block.
        choice: Its choice.
        kept: Share of its parameters that are kept; None where its size is not known.
        is_stack: Whether it is one of several roles that were decomposed as one.
    """

    name: str
    choice: TensorChoice
    kept: float | None
    is_stack: bool = False


def layer_and_role(name: str) -> tuple[int, str]:
    """Of a part's name; `OTHER` and the name itself outside the layers."""
    matched = _NAME.fullmatch(name)
    return (int(matched[1]), matched[2]) if matched else (OTHER, name)


def placed_choices(record: TrialRecord, shape: Mapping[str, Any]) -> dict[tuple[int, str], Placed]:
    """Layer and role to what stands there; dense tensors are left out."""
    found: dict[tuple[int, str], Placed] = {}
    for name, entry in record.point.get("tensors", {}).items():
        choice = TensorChoice.from_json(entry)
        layer, role = layer_and_role(name)
        if choice.is_removal:
            members = shape["blocks"].get(role, [role])
            placed = Placed(name, choice, 0.0)
        else:
            members = shape["stacks"].get(role, [role])
            placed = Placed(name, choice, _kept(layer, members, choice, shape), len(members) > 1)
        found |= {(layer, member): placed for member in members}
    return found


def _kept(layer: int, roles: Sequence[str], choice: TensorChoice, shape: Mapping[str, Any]) -> float | None:
    """Parameters of the factors over those of the rows that they stand for."""
    sizes = shape.get("sizes", {})
    names = [role if layer == OTHER else f"layers.{layer}.{role}" for role in roles]
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


def rank_map_of(record: TrialRecord, shape: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """Layer to role to what stands there: a rank, `gone` for a removed block, `.` for dense."""
    columns = [*shape["roles"]]
    found: dict[int, dict[str, str]] = {layer: dict.fromkeys(columns, _DENSE) for layer in range(shape["layers"])}
    for (layer, role), placed in placed_choices(record, shape).items():
        row = found.setdefault(layer, dict.fromkeys(columns, _DENSE))
        row[role] = _GONE if placed.choice.is_removal else str(placed.choice.rank)
    return dict(sorted(found.items()))


def rank_map_text(ranks: Mapping[int, Mapping[str, str]]) -> list[str]:
    """The map as lines of text, one a layer; `.` is dense, `gone` a removed block, a number the rank."""
    columns = list(dict.fromkeys(role for row in ranks.values() for role in row))
    width = max([6, *(len(role) for role in columns)])
    lines = ["layer " + " ".join(f"{role:>{width}}" for role in columns)]
    for layer, row in ranks.items():
        named = "other" if layer == OTHER else str(layer)
        lines.append(f"{named:>5} " + " ".join(f"{row.get(role, _DENSE):>{width}}" for role in columns))
    return lines


def shape_of(attributes: Mapping[str, Any], records: Sequence[TrialRecord]) -> Mapping[str, Any]:
    """Layers and roles as the study keeps them, or as far as the points of an older study name them."""
    kept: Mapping[str, Any] | None = attributes.get("facts", {}).get("shape")
    if kept:
        return kept
    parts = [layer_and_role(name) for record in records for name in record.point.get("tensors", {})]
    inside = [(layer, role) for layer, role in parts if layer != OTHER]
    roles = list(dict.fromkeys(role for _, role in inside))
    return {"layers": 1 + max((layer for layer, _ in inside), default=-1), "roles": roles, "blocks": {}, "stacks": {}}
