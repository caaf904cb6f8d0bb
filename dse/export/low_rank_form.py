"""The low-rank form of an export: the factors, a config that lists them, and the modelling code that reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.decomposition import LowRankLinear, NormThenFactor, PivotedLinear, StackedLinear, TuckerExperts
from dse.design_point import DesignPoint
from dse.export.kept_layers import KeptLayers
from dse.export.modelling_code import MODEL_TYPE_PREFIX, MODELLING_MODULE, body_of, modelling_code
from dse.export.weights import write_weights
from dse.topology import Topology

__all__ = ["low_rank_config", "write_low_rank_form"]


def write_low_rank_form(
    model: PreTrainedModel, topology: Topology, point: DesignPoint, auto: tuple[str, ...], folder: Path
) -> dict[str, Tensor]:
    """Write weights, config.json and the modelling file of `model`, to which `point` is applied.

    Args:
        model: The model with the low-rank modules of the point.
        topology: Its topology.
        point: The applied point.
        auto: Names of the transformers auto classes that load this architecture.
        folder: An existing folder.

    Returns:
        Every weight of the exported model by its name in the export; layers behind a dropped one have new numbers.
    """
    config = low_rank_config(model, topology, point, auto)
    has_experts = any(name in topology.experts_by_name for name, _ in point)
    classes = type(model), type(body_of(model)), type(model.config)
    code = modelling_code(
        *classes,
        has_experts=has_experts,
        joins_heads="attention_outputs" in config,
        is_pivoted=any(choice.is_pivoted for _, choice in point),
    )
    (folder / f"{MODELLING_MODULE}.py").write_text(code, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    kept = KeptLayers.of(topology, point)
    write_weights(model, folder, renamed=kept.renamed)
    return {kept.renamed(name): tensor for name, tensor in model.state_dict().items()}


def low_rank_config(
    model: PreTrainedModel, topology: Topology, point: DesignPoint, auto: tuple[str, ...]
) -> dict[str, Any]:
    """config.json: the architecture's config under a model type of its own, with `low_rank` and `removed` entries."""
    body, kept = body_of(model), KeptLayers.of(topology, point)
    body_path = "" if body is model else f"{model.base_model_prefix}."
    inside: dict[str, dict[str, Any]] = {}
    outside: dict[str, dict[str, Any]] = {}
    for path, form in _forms(model, topology, point).items():
        is_inside = path.startswith(body_path)
        paths = {key: _below(value, body_path, kept) if is_inside else value for key, value in form.items()}
        (inside if is_inside else outside)[_below(path, body_path, kept) if is_inside else path] = paths
    model_class, config_class = type(model).__name__, type(model.config).__name__
    config: dict[str, Any] = model.config.to_diff_dict()
    config.pop("quantization_config", None)  # the weights are plain floats, whatever file they came from
    if getattr(model, "pooler", 0) is None:  # a body without a pooler, taken from a checkpoint with another head
        config["add_pooling_layer"] = False
    if point.removed:
        config |= kept.counted(model.config)
        config["removed"] = kept.removal(model.config, body_path)
    if outside:
        config["low_rank_head"] = outside
    if outputs := _attention_outputs(topology, point):
        config["attention_outputs"] = [_below(path, body_path, kept) for path in outputs]
    classes = dict.fromkeys(auto, f"{MODELLING_MODULE}.LowRank{model_class}")
    if topology.is_decoder:  # an encoder's body may have a pooler that is missing from the file of another head
        classes.setdefault("AutoModel", f"{MODELLING_MODULE}.LowRank{type(body).__name__}")
    return (
        config
        | _older_rope_settings(model)
        | {
            "model_type": MODEL_TYPE_PREFIX + type(model.config).model_type,
            "architectures": [f"LowRank{model_class}"],
            "auto_map": {"AutoConfig": f"{MODELLING_MODULE}.LowRank{config_class}"} | classes,
            "dtype": str(model.dtype).removeprefix("torch."),
            "low_rank": inside,
        }
    )


def _forms(model: PreTrainedModel, topology: Topology, point: DesignPoint) -> dict[str, dict[str, Any]]:
    """Path of each replaced module to what the modelling code needs to build its replacement."""
    found: dict[str, dict[str, Any]] = {}
    for name in point.widths:
        for tensor in topology.mlp(name).tensors:
            module = model.get_submodule(tensor.module)
            assert isinstance(module, nn.Linear)  # noqa: S101 - inserted by surgery
            shape = [module.out_features, module.in_features]
            found[tensor.module] = {"shape": shape, "bias": module.bias is not None}
    for name, choice in point.decomposed:
        if name in topology.experts_by_name:
            path = topology.experts_by_name[name].module
            found[path] = {"experts": _expert_ranks(model.get_submodule(path))}
            continue
        paths = topology.matrix(name).modules
        norm = topology.stacks_by_name[name].norm if name in topology.stacks_by_name else ""
        before = model.get_submodule(norm) if norm else None
        for path in paths:
            module = model.get_submodule(path)
            right_owner = module.shared if isinstance(module, StackedLinear) else before or module
            if isinstance(module, PivotedLinear):
                found[path] = _pivoted_form(module)
                continue
            assert isinstance(module, (LowRankLinear, StackedLinear, nn.Linear))  # noqa: S101 - inserted by surgery
            has_core = getattr(right_owner, "core", None) is not None
            found[path] = {"rank": choice.rank, "core": has_core, "bias": module.bias is not None}
            if name in topology.stacks_by_name:
                found[path]["stack"] = list(paths)
            if isinstance(before, NormThenFactor):
                found[path]["norm"] = norm
    return found


def _pivoted_form(module: PivotedLinear) -> dict[str, Any]:
    """Rank, bias, and the independent columns or rows as text, since engines load no buffers."""
    side = "columns" if module.of_columns else "rows"
    return {"rank": module.rank, "core": False, "bias": module.bias is not None, side: _as_ranges(module.chosen)}


def _as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as `0-3,7,9-12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _attention_outputs(topology: Topology, point: DesignPoint) -> list[str]:
    """Attention output matrices whose input needs its shape restored in engines; see `separate_tokens` in the template.

    These are stored as `Conv1D`: GPT-2's attention joins the last two axes of its output, where later ones name them.
    """
    gone = {name for block in point.removed for name in topology.blocks_by_name[block].tensors}
    outputs = [one for one in topology.tensors if one.role == "attention_output" and one.kind == "conv1d"]
    return [one.module for one in outputs if one.name not in gone]


def _below(value: Any, prefix: str, kept: KeptLayers) -> Any:
    """A path, or list of paths, in the model's body, with the numbers of the layers in the export; else the value."""
    if isinstance(value, list):
        return [_below(item, prefix, kept) for item in value]
    return kept.renamed(value).removeprefix(prefix) if isinstance(value, str) else value


def _older_rope_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Rotary settings at top level: transformers 4 does not read `rope_parameters`, and would silently use defaults.

    Transformers 5 prefers `rope_parameters`, which hold the same values.
    """
    rope = getattr(model.config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return {}
    of_full: dict[str, Any] = rope.get("full_attention") or rope
    if of_full.get("rope_theta") is None:
        return {}
    found = {"rope_theta": of_full["rope_theta"]}
    partial = of_full.get("partial_rotary_factor")
    if partial is not None:
        found["partial_rotary_factor"] = partial
    if model.config.model_type == "gpt_neox":
        found |= {"rotary_emb_base": of_full["rope_theta"], "rotary_pct": partial}
    if rope.get("sliding_attention"):
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if of_full.get("rope_type", "default") != "default":
        common = ("rope_theta", "partial_rotary_factor")
        found["rope_scaling"] = {name: value for name, value in of_full.items() if name not in common}
    return found


def _expert_ranks(module: nn.Module) -> dict[str, list[int]]:
    """Multilinear ranks of both tensors of a layer's experts; full ranks for a dense tensor."""
    assert isinstance(module, TuckerExperts)  # noqa: S101 - inserted by surgery
    return {"gate_up": list(module.gate_up.core.shape), "down": list(module.down.core.shape)}
