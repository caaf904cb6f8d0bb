"""Topologies without a model: of given shapes, and of published models from their configs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dse.model_parts import DecomposableTensor
from dse.topology import Topology

Shapes = Mapping[str, tuple[int, int]]


def topology_of_shapes(
    layers: Sequence[Shapes], outside: Shapes | None = None, other: int = 50, **fields: Any
) -> Topology:
    """A topology of these layers, each a mapping from role to shape.

    Args:
        layers: One mapping per layer.
        outside: Tensors outside the layers.
        other: Number of parameters that no method decomposes.
        fields: Further fields of the topology.
    """
    tensors = [
        DecomposableTensor(f"layers.{i}.{role}", f"m.{i}.{role}", i, role, *shape)
        for i, roles in enumerate(layers)
        for role, shape in roles.items()
    ]
    tensors += [DecomposableTensor(role, role, None, role, *shape) for role, shape in (outside or {}).items()]
    total = sum(tensor.parameters for tensor in tensors) + other
    return Topology("Tiny", "tiny", len(layers), tuple(tensors), parameters_dense=total, **fields)


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "demo:smollm2-135m-instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
"""Model references to the settings that their own configs state."""
LLAMA2_7B = "meta-llama/Llama-2-7b-chat-hf"


def save_published_config(folder: Path, ref: str) -> Path:
    """Write the `config.json` of a published model into a new folder, without weights; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[ref]), encoding="utf-8")
    return folder
