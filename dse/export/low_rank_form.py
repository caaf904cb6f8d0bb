"""The low-rank form of an export: factors as they are, a config that names them, and the code that reads them."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from dse.decomposition import LowRankLinear, StackedLinear
from dse.decomposition.removal import removal_plan
from dse.design_point import DesignPoint
from dse.export.weights import write_weights
from dse.topology import Topology

__all__ = ["MODEL_TYPE_PREFIX", "low_rank_config", "modelling_code", "write_low_rank_form"]

MODEL_TYPE_PREFIX = "lowrank-"
_MODULE = "modeling_lowrank"


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
    (folder / f"{_MODULE}.py").write_text(modelling_code(type(model), type(model.config)), encoding="utf-8")
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


def modelling_code(model_class: type[PreTrainedModel], config_class: type) -> str:
    """The modelling file for one architecture: the template, which is written for Llama, with the names put in."""
    template = resources.files("dse.export").joinpath("templates", f"{_MODULE}.py").read_text(encoding="utf-8")
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
