"""Sizes of a Hugging Face model that cost arithmetic needs in addition to its decomposable tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dse.model_parts import DecomposableTensor

__all__ = [
    "attention_widths",
    "experts_per_token",
    "is_causal",
    "layer_attention_widths",
    "matmul_entries",
    "other_in_layers",
    "other_outside_layers",
    "output_head",
    "persistent_buffer_bytes",
    "repeated_paths",
]

_EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k")
_EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTED_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
_ONCE_PER_SEQUENCE = re.compile(r"(^|\.)(pooler|seq_relationship|classifier|pre_classifier)(\.|$)")


def repeated_paths(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Path prefixes of all repeated blocks: the layers, and other stacks such as those of an image encoder."""
    return tuple(f"{path}." for path, module in modules.items() if isinstance(module, nn.ModuleList))


def _expert_share(model: PreTrainedModel) -> float:
    """The share of the routed experts that multiplies one token, by the config; 1 if it does not say."""
    config = model.config.get_text_config()
    used = next((v for key in _EXPERTS_PER_TOKEN_KEYS if isinstance(v := getattr(config, key, None), int)), None)
    total = next((v for key in _EXPERT_COUNT_KEYS if isinstance(v := getattr(config, key, None), int)), None)
    return used / total if used and total else 1.0


def experts_per_token(model: PreTrainedModel, experts: int) -> int:
    """How many of the routed experts multiply one token, by the config; all if it does not say."""
    return round(experts * _expert_share(model))


def other_in_layers(
    model: PreTrainedModel, block_path: str, blocks: nn.ModuleList, mapped: set[str]
) -> tuple[int, tuple[str, ...]]:
    """Entries per token of the layers' matrices that are not decomposable, and the paths of their modules."""
    found = [
        entry for i, block in enumerate(blocks) for entry in matmul_entries(model, f"{block_path}.{i}", block, mapped)
    ]
    return sum(entries for _, entries in found), tuple(path for path, _ in found)


def matmul_entries(model: PreTrainedModel, prefix: str, part: nn.Module, mapped: set[str]) -> Iterator[tuple[str, int]]:
    """Path and entries per token of each module in `part` (at `prefix`) that multiplies and is not in `mapped`."""
    share = _expert_share(model)
    counted: list[str] = []
    for path, module in part.named_modules(prefix=prefix):
        if type(module).__name__ == "TuckerExperts":  # in an export of dse
            counted.append(f"{path}.")
            yield path, _entries_of_decomposed(module, share)
        if path.startswith(tuple(counted)) or path in mapped or isinstance(module, nn.Embedding):
            continue
        # Matrices have two dimensions, fused experts and convolutions three; norms and biases have one.
        parameters = module.named_parameters(recurse=False)
        if entries := sum(p.numel() for name, p in parameters if p.ndim >= 2 and not name.endswith("bias")):
            yield path, round(entries * share) if _ROUTED_EXPERT.search(path) else entries


def _entries_of_decomposed(module: nn.Module, share: float) -> int:
    """Entries per token of Tucker-decomposed experts, of which a token uses this share."""
    total = 0
    for name, is_input_shared in (("gate_up", True), ("down", False)):
        sizes = {key: tuple(p.shape) for key, p in module.get_submodule(name).named_parameters()}
        of_cores, of_out, of_in = sizes["core"]
        chosen = round(share * sizes.get("experts", sizes["core"])[0])
        total += math.prod(sizes.get("right", (0,))) * (1 if is_input_shared else chosen)
        total += math.prod(sizes.get("left", (0,))) * (chosen if is_input_shared else 1)
        total += (of_cores if "experts" in sizes else chosen) * of_out * of_in
        total += chosen * of_cores * (of_out if is_input_shared else of_in) if "experts" in sizes else 0
    return total


def other_outside_layers(model: PreTrainedModel, modules: Mapping[str, nn.Module], head: nn.Module | None) -> int:
    """Entries per token of matrices outside every repeated block: projections, and transforms before the head."""
    repeated = repeated_paths(modules)
    per_sequence = re.search("SequenceClassification|MultipleChoice|NextSent", type(model).__name__)
    entries = 0
    for path, module in modules.items():
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head or path.startswith(repeated):
            continue
        once = _ONCE_PER_SEQUENCE.search(path)
        if once and (per_sequence or once[2] in ("pooler", "seq_relationship")):
            continue
        entries += module.weight.numel()
    return entries


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that maps hidden states to token logits; None if the model has none."""
    try:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def attention_widths(model: PreTrainedModel, tensors: list[DecomposableTensor], layers: int) -> tuple[int, int]:
    """Total width of the query heads and of the key/value heads, averaged over the layers.

    Read from the matrices, because a config may leave the head size to a default: the input of the attention output is
    the width of the query heads, and a fused projection holds queries, keys and values together.
    """
    by_layer: dict[int | None, list[DecomposableTensor]] = {}
    for tensor in tensors:
        by_layer.setdefault(tensor.layer, []).append(tensor)
    found = [_attention_widths(of_layer) for of_layer in by_layer.values()]
    attention = [width for width, _ in found if width is not None]
    key_value = [width for _, width in found if width is not None]
    by_config = _config_attention_widths(model)
    return (
        round(sum(attention) / layers) if attention else by_config[0],
        round(sum(key_value) / layers) if key_value else by_config[1],
    )


def layer_attention_widths(model: PreTrainedModel, tensors: list[DecomposableTensor]) -> tuple[int, int]:
    """`attention_widths` of one layer, from its tensors."""
    attention, key_value = _attention_widths(tensors)
    by_config = _config_attention_widths(model)
    return (by_config[0] if attention is None else attention, by_config[1] if key_value is None else key_value)


def _attention_widths(tensors: list[DecomposableTensor]) -> tuple[int | None, int | None]:
    by_role = {tensor.role: tensor for tensor in tensors}
    output, fused = by_role.get("attention_output"), by_role.get("query_key_value")
    key_value = None
    if "key" in by_role:
        key_value = by_role["key"].out_features
    elif fused is not None and output is not None:
        key_value = (fused.out_features - output.in_features) // 2
    return None if output is None else output.in_features, key_value


def _config_attention_widths(model: PreTrainedModel) -> tuple[int, int]:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    head_size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads * head_size, key_value_heads * head_size


def is_causal(model: PreTrainedModel, block: nn.Module) -> bool:
    """Whether a token attends only to earlier tokens: read from attention; without attention, from `can_generate`."""
    flags = [flag for module in block.modules() if isinstance(flag := getattr(module, "is_causal", None), bool)]
    return any(flags) if flags else bool(model.can_generate())


def persistent_buffer_bytes(model: nn.Module) -> int:
    """Bytes of the buffers that are saved with the weights; shared ones count once."""
    buffers = {
        id(buffer): buffer.numel() * buffer.element_size()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return sum(buffers.values())
