"""The low-rank form of an export: factors as they are, a config that names them, and the code that reads them."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from dse.decomposition import LowRankLinear, StackedLinear, TuckerExperts
from dse.decomposition.removal import removal_plan
from dse.design_point import DesignPoint
from dse.export.weights import write_weights
from dse.topology import Topology

__all__ = ["MODEL_TYPE_PREFIX", "low_rank_config", "modelling_code", "write_low_rank_form"]

MODEL_TYPE_PREFIX = "lowrank-"
_MODULE = "modeling_lowrank"
_EXPERTS_CODE = re.compile(
    r"class TuckerExpertWeight.*?(?=class RemovedBlock)"
    r"|            if \"experts\" in form:\n.*?continue\n"
    r"| Experts are named with .*?\(experts, out, in\)\.",
    re.DOTALL,
)


def write_low_rank_form(
    model: PreTrainedModel, topology: Topology, point: DesignPoint, auto: tuple[str, ...], folder: Path
) -> None:
    """Write weights, config.json and the modelling file of `model`, in which `point` is applied.

    Args:
        model: Holds the low-rank modules now.
        topology: Names the modules of the point.
        point: What is applied.
        auto: Names of the transformers auto classes that load this architecture.
        folder: An existing folder.
    """
    config = low_rank_config(model, topology, point, auto)
    has_experts = any(name in topology.experts_by_name for name, _ in point)
    code = modelling_code(type(model), type(model.config), has_experts=has_experts)
    (folder / f"{_MODULE}.py").write_text(code, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_weights(model, folder)


def low_rank_config(
    model: PreTrainedModel, topology: Topology, point: DesignPoint, auto: tuple[str, ...]
) -> dict[str, Any]:
    """config.json: the architecture's own, under a model type of its own, with the form of every low-rank module and
    what is removed."""
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
            assert isinstance(module, (LowRankLinear, StackedLinear))  # noqa: S101 - surgery has put it there
            form = {"rank": module.rank, "core": module.factors().core is not None, "bias": module.bias is not None}
            low_rank[path] = form | ({"stack": list(paths)} if isinstance(module, StackedLinear) else {})
    model_class, config_class = type(model).__name__, type(model.config).__name__
    config: dict[str, Any] = model.config.to_diff_dict()
    config.pop("quantization_config", None)  # the weights are plain floats, wherever they came from
    if getattr(model, "pooler", 0) is None:  # a body that was taken from under another head, without a pooler
        config["add_pooling_layer"] = False
    if point.removed:
        config["removed"] = dataclasses.asdict(removal_plan(topology, point.removed))
    return config | {
        "model_type": MODEL_TYPE_PREFIX + type(model.config).model_type,
        "architectures": [f"LowRank{model_class}"],
        "auto_map": {"AutoConfig": f"{_MODULE}.LowRank{config_class}"}
        | dict.fromkeys(auto, f"{_MODULE}.LowRank{model_class}"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "low_rank": low_rank,
    }


def _expert_ranks(module: nn.Module) -> dict[str, list[int]]:
    """Multilinear ranks of both tensors of a layer's experts; full ranks where one stays dense."""
    assert isinstance(module, TuckerExperts)  # noqa: S101 - surgery has put it there
    return {"gate_up": list(module.gate_up.core.shape), "down": list(module.down.core.shape)}


def modelling_code(model_class: type[PreTrainedModel], config_class: type, *, has_experts: bool = False) -> str:
    """The modelling file for one architecture: the template, which is written for Llama, with the names put in.

    Args:
        model_class: Of the base model.
        config_class: Of its config.
        has_experts: Whether fused expert tensors are decomposed; without, the code for them is left out.
    """
    template = resources.files("dse.export").joinpath("templates", f"{_MODULE}.py").read_text(encoding="utf-8")
    template = template if has_experts else _EXPERTS_CODE.sub("", template)
    names = {
        "from transformers import LlamaConfig, LlamaForCausalLM": _imports(model_class, config_class),
        "LlamaForCausalLM": model_class.__name__,
        "LlamaConfig": config_class.__name__,
        "lowrank-llama": MODEL_TYPE_PREFIX + config_class.model_type,  # type: ignore[attr-defined]
        "A Llama model": f"A {model_class.__name__.split('For')[0]} model",
    }
    # One pass, so that a name put in is never read as one to replace.
    return re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], template)


def _imports(model_class: type, config_class: type) -> str:
    lines = []
    for cls in sorted((model_class, config_class), key=lambda cls: cls.__name__):
        home = "transformers" if getattr(transformers, cls.__name__, None) is cls else cls.__module__
        lines.append(f"from {home} import {cls.__name__}")
    return "\n".join(lines)
