"""Exports of points with removed blocks and stacks: self-contained, exact, generating as the resident model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from dse.cost import cost
from dse.decomposition import decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.export import export_point
from dse.models import topology_of
from dse.models.quiet import quiet_transformers

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "head_dim": 16, "sliding_window": 5}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]] = {
    "Llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True)),
    "Gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**WINDOWED, layer_types=KINDS)),
    "GPT2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "GPTNeoX": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**COMMON)),
    "Mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=3)),
}
PROMPT = torch.tensor([[5, 9, 120, 33, 7]])
RULES = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(PROMPT)}


def removed_and_decomposed(topology) -> DesignPoint:  # type: ignore[no-untyped-def]
    """The first attention and a whole layer removed, one tensor and what stacks there are decomposed."""
    gone = dict.fromkeys(("layers.0.attention", "layers.2.attention", "layers.2.mlp"), TensorChoice.removal())
    kept = {"layers.3.attention_output": TensorChoice("svd", 3)}
    stacked = {"layers.1.query_key_value": TensorChoice("tucker", 5), "layers.3.gate_up": TensorChoice("svd", 4)}
    return DesignPoint.of(gone | kept | {n: c for n, c in stacked.items() if n in topology.stacks_by_name})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_some_blocks(
    family: str, tmp_path: Path, make_loaded: Callable, make_factors: Callable
) -> None:
    torch.manual_seed(0)
    model_class, config = FAMILIES[family]
    loaded = make_loaded(model_class(config))
    for name, parameter in loaded.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    point, factors = removed_and_decomposed(loaded.topology), make_factors(loaded)
    verify = family == "Llama"  # in a fresh process; the others are read back here, which is faster

    result = export_point(loaded, point, factors, tmp_path / "thin", verify=verify)
    export_point(loaded, point, factors, tmp_path / "dense", dense=True, verify=verify)

    with quiet_transformers():
        thin = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "thin", trust_remote_code=True).eval()
        dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        cached = thin.generate(PROMPT, **RULES)
        assert torch.equal(cached, thin.generate(PROMPT, use_cache=False, **RULES))
        with decompose(loaded, point, factors):
            assert torch.equal(thin(PROMPT).logits, loaded.model(PROMPT).logits)
            assert torch.equal(cached, loaded.model.generate(PROMPT, **RULES))
            torch.testing.assert_close(dense(PROMPT).logits, loaded.model(PROMPT).logits, atol=1e-5, rtol=1e-4)
            assert thin.state_dict().keys() == loaded.model.state_dict().keys()
    assert sum(p.numel() for p in thin.parameters()) == cost(loaded.topology, point).parameters == result.parameters
    assert type(dense) is model_class
    assert not any(".2." in name for name in thin.state_dict())
    text = (tmp_path / "thin" / "README.md").read_text()
    assert "without 2 of its 4 attention blocks and 1 of its 4 MLP blocks" in text
    assert json.loads((tmp_path / "thin" / "design_point.json").read_text()) == point.to_json()
    names = [name for name in thin.state_dict() if name.endswith("owned.right")]
    assert len(names) == sum(name in loaded.topology.stacks_by_name for name, _ in point)  # stored once a stack
    again = topology_of(thin)
    assert (again.layer_count, again.parameters_dense) == (4, result.parameters)
