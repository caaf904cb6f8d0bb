"""The low-rank form of an export: the factors, a config that lists them, and the modelling code that reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dse.decomposition import LowRankLinear, StackedLinear, TuckerExperts
from dse.decomposition.block_removal import removal_plan
from dse.decomposition.factors import factors_of
from dse.design_point import DesignPoint
from dse.export.modelling_code import MODEL_TYPE_PREFIX, MODELLING_MODULE, modelling_code
from dse.export.weights import write_weights
from dse.topology import Topology

__all__ = ["low_rank_config", "write_low_rank_form"]


def write_low_rank_form(
    model: PreTrainedModel, topology: Topology, point: DesignPoint, auto: tuple[str, ...], folder: Path
) -> None:
    """Write weights, config.json and the modelling file of `model`, to which `point` is applied.

    Args:
        model: The model with the low-rank modules of the point.
        topology: Its topology.
        point: The applied point.
        auto: Names of the transformers auto classes that load this architecture.
        folder: An existing folder.
    """
    config = low_rank_config(model, topology, point, auto)
    has_experts = any(name in topology.experts_by_name for name, _ in point)
    code = modelling_code(type(model), type(model.config), has_experts=has_experts)
    (folder / f"{MODELLING_MODULE}.py").write_text(code, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_weights(model, folder)


def low_rank_config(
    model: PreTrainedModel, topology: Topology, point: DesignPoint, auto: tuple[str, ...]
) -> dict[str, Any]:
    """config.json: the architecture's config under a model type of its own, with `low_rank` and `removed` entries."""
    low_rank: dict[str, dict[str, Any]] = {}
    for name, choice in point:
        if choice.is_removal:
            continue
        if name in topology.experts_by_name:
            path = topology.experts_by_name[name].module
            low_rank[path] = {"experts": _expert_ranks(model.get_submodule(path))}
            continue
        paths = topology.matrix(name).modules
        for path in paths:
            module = model.get_submodule(path)
            assert isinstance(module, (LowRankLinear, StackedLinear))  # noqa: S101 - inserted by surgery
            has_core = factors_of(module).core is not None
            form = {"rank": module.rank, "core": has_core, "bias": module.bias is not None}
            low_rank[path] = form | ({"stack": list(paths)} if isinstance(module, StackedLinear) else {})
    model_class, config_class = type(model).__name__, type(model.config).__name__
    config: dict[str, Any] = model.config.to_diff_dict()
    config.pop("quantization_config", None)  # the weights are plain floats, whatever file they came from
    if getattr(model, "pooler", 0) is None:  # a body without a pooler, taken from a checkpoint with another head
        config["add_pooling_layer"] = False
    if point.removed:
        config["removed"] = dataclasses.asdict(removal_plan(topology, point.removed))
    return config | {
        "model_type": MODEL_TYPE_PREFIX + type(model.config).model_type,
        "architectures": [f"LowRank{model_class}"],
        "auto_map": {"AutoConfig": f"{MODELLING_MODULE}.LowRank{config_class}"}
        | dict.fromkeys(auto, f"{MODELLING_MODULE}.LowRank{model_class}"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "low_rank": low_rank,
    }


def _expert_ranks(module: nn.Module) -> dict[str, list[int]]:
    """Multilinear ranks of both tensors of a layer's experts; full ranks for a dense tensor."""
    assert isinstance(module, TuckerExperts)  # noqa: S101 - inserted by surgery
    return {"gate_up": list(module.gate_up.core.shape), "down": list(module.down.core.shape)}
