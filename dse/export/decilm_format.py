"""`--format decilm`: a Llama-like model with blocks of its own in every layer, as `DeciLMForCausalLM`.

vLLM implements this architecture itself. transformers loads it with the two Python files in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from dse.design_point import DesignPoint
from dse.errors import ExportError
from dse.export.weights import write_weights
from dse.models import LoadedModel
from dse.topology import Topology

__all__ = ["check_decilm", "decilm_config", "write_decilm"]

_MODULES = ("configuration_decilm", "modeling_decilm")
_FAMILIES = {"LlamaForCausalLM": False, "MistralForCausalLM": False, "Qwen2ForCausalLM": True}
"""Classes that compute as DeciLM does, to whether query, key and value have a bias without one on the output."""


def check_decilm(loaded: LoadedModel, point: DesignPoint) -> None:
    """Check that the architecture and the point have this form.

    Raises:
        ExportError: They have not.
    """
    name, config = type(loaded.model).__name__, loaded.model.config
    if name not in _FAMILIES:
        raise ExportError(
            f"`--format decilm` needs a {' or '.join(_FAMILIES)}, but got a {name}; use `--format transformers`"
        )
    if _uses_window(config):
        raise ExportError(
            "`--format decilm` needs full attention in every layer, but the model has a sliding window; use"
            " `--format transformers`"
        )
    if others := [part for part, _ in point.decomposed]:
        raise ExportError(
            f"`--format decilm` needs a point of removed blocks and widths alone, but it decomposes {len(others)}"
            f" tensors (first: '{others[0]}'); use `--format transformers`"
        )
    layers = _kept_blocks(loaded.topology, point)
    first = next((blocks for blocks in layers if blocks), None)
    if first is None or "attention" not in first:
        raise ExportError(
            "`--format decilm` needs attention in the first layer that is left, where vLLM starts the residual stream,"
            " but the point removes it; use `--format transformers`"
        )


def write_decilm(loaded: LoadedModel, point: DesignPoint, folder: Path) -> Mapping[str, Tensor]:
    """Write weights, config.json and the two Python files of the resident model, with the point applied.

    Args:
        loaded: The model with the point applied.
        point: The applied point, which `check_decilm` accepted.
        folder: An existing folder.

    Returns:
        The weights by name.
    """
    for module in _MODULES:
        source = resources.files("dse.export").joinpath("templates", f"{module}.py").read_text(encoding="utf-8")
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    config = decilm_config(loaded.model, loaded.topology, point)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_weights(loaded.model, folder)
    return dict(loaded.model.state_dict())


def decilm_config(model: nn.Module, topology: Topology, point: DesignPoint) -> dict[str, Any]:
    """config.json: that of a Llama model, with one entry of `block_configs` for each layer.

    A block has its own MLP width, read from its module, so a point that reduces widths is written the same way.
    """
    base: Any = model.config
    config: dict[str, Any] = base.to_dict()
    for name in ("quantization_config", "layer_types", "sliding_window", "max_window_layers", "use_sliding_window"):
        config.pop(name, None)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # where transformers before version 5 looks for it
        config["rope_theta"] = rope["rope_theta"]
    group = base.num_attention_heads // (base.num_key_value_heads or base.num_attention_heads)
    kept = _kept_blocks(topology, point)
    widths = [_mlp_width(model, layer, base.intermediate_size) if "mlp" in b else None for layer, b in enumerate(kept)]
    blocks = [
        {
            "attention": {"no_op": "attention" not in block, "n_heads_in_group": group},
            "ffn": {"no_op": width is None, "intermediate_size": width, "hidden_act": base.hidden_act},
        }
        for block, width in zip(kept, widths, strict=True)
    ]
    if _FAMILIES[type(model).__name__]:
        config |= {"qkv_bias": True, "attention_bias": False}
    return config | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModel": "modeling_decilm.DeciLMModel",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": blocks,
        "head_dim": getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _kept_blocks(topology: Topology, point: DesignPoint) -> Sequence[frozenset[str]]:
    """Roles of the blocks that each layer keeps, by layer."""
    removed = {(topology.blocks_by_name[name].layer, topology.blocks_by_name[name].role) for name in point.removed}
    roles = ("attention", "mlp")
    return [frozenset(role for role in roles if (layer, role) not in removed) for layer in range(topology.layer_count)]


def _mlp_width(model: nn.Module, layer: int, default: int) -> int:
    up = getattr(model.get_submodule(f"model.layers.{layer}.mlp"), "up_proj", None)
    return int(getattr(up, "out_features", default))


def _uses_window(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
