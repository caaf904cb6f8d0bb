"""Operations that need the model's config but not its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.config import load_search_space
from dse.cost import Cost, point_cost
from dse.design_point import DesignPoint
from dse.search.spaces.base import SearchSpace
from dse.standalone.model_request import ModelRequest
from dse.topology import Topology

__all__ = ["ModelCost", "describe_space", "model_cost"]


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model at a point, with the topology and the point it refers to."""

    topology: Topology
    point: DesignPoint
    cost: Cost


def model_cost(model: ModelRequest, point: str, *, prompt_tokens: int) -> ModelCost:
    """Exact parameters, bytes and FLOPs of a model at a point.

    Args:
        model: The model; its dtype and device are not used.
        point: JSON text, a JSON file, or "dense".
        prompt_tokens: Tokens in the prompt (prefill) and in the KV cache (decode).

    Raises:
        UserError: The model or the point is not valid.
    """
    topology = model.topology()
    found = DesignPoint.read(point, topology)
    return ModelCost(topology, found, point_cost(topology, found, prompt_tokens=prompt_tokens))


def describe_space(space: str | Path, model: ModelRequest) -> dict[str, Any]:
    """Size, ranks and limits of a search space on a model, as a JSON document.

    Args:
        space: A search-space file, or the name of a shipped one.
        model: The model; its dtype and device are not used.

    Raises:
        UserError: The model or the space is not valid.
    """
    config = load_search_space(Path(space))
    return SearchSpace.from_config(config, model.topology(config.role_names)).describe()
