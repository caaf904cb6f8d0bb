"""Exports with removed blocks and stacks: they load without dse, and compute and generate like the resident model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import tiny_model, with_random_vectors

from dse.cost import point_cost
from dse.decomposition import decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.export import export_point
from dse.models import topology_of
from dse.models.transformers_patches import quiet_transformers

KINDS = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "gemma2": {"sliding_window": 5, "layer_types": KINDS},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 3, "initializer_range": 0.02},
    "qwen2": {},
}
PROMPT = torch.tensor([[5, 9, 120, 33, 7]])
RULES = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(PROMPT)}


def removed_and_decomposed(topology) -> DesignPoint:  # type: ignore[no-untyped-def]
    """The first attention block and a whole layer removed; one tensor and the available stacks decomposed."""
    gone = dict.fromkeys(("layers.0.attention", "layers.2.attention", "layers.2.mlp"), TensorChoice.removal())
    kept = {"layers.3.attention_output": TensorChoice("svd", 3)}
    stacked = {"layers.1.query_key_value": TensorChoice("tucker", 5), "layers.3.gate_up": TensorChoice("svd", 4)}
    return DesignPoint.of(gone | kept | {n: c for n, c in stacked.items() if n in topology.stacks_by_name})


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_removed_blocks_reload_exactly(
    family: str, tmp_path: Path, make_loaded: Callable, make_factors: Callable
) -> None:
    model = tiny_model(family, num_hidden_layers=4, pad_token_id=0, **FAMILIES[family])
    loaded = make_loaded(with_random_vectors(model))
    point, factors = removed_and_decomposed(loaded.topology), make_factors(loaded)
    verify = family == "llama"  # in a new process; the others are reloaded here, which is faster

    result = export_point(loaded, point, factors, tmp_path / "thin", verify=verify)
    export_point(loaded, point, factors, tmp_path / "dense", format="dense", verify=verify)

    with quiet_transformers(), torch.inference_mode():
        thin = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "thin", trust_remote_code=True).eval()
        dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        cached = thin.generate(PROMPT, **RULES)
        assert torch.equal(cached, thin.generate(PROMPT, use_cache=False, **RULES))
        with decompose(loaded, point, factors):
            assert torch.equal(thin(PROMPT).logits, loaded.model(PROMPT).logits)
            assert torch.equal(cached, loaded.model.generate(PROMPT, **RULES))
            torch.testing.assert_close(dense(PROMPT).logits, loaded.model(PROMPT).logits, atol=1e-5, rtol=1e-4)
            assert {later(name) for name in thin.state_dict()} == set(loaded.model.state_dict())
    held = sum(p.numel() for p in thin.parameters())
    assert held == point_cost(loaded.topology, point).parameters == result.parameters
    assert type(dense) is type(model)
    assert thin.config.num_hidden_layers == 2  # attention blocks, each with a slot in the KV cache
    assert not any(".3." in name for name in thin.state_dict())  # the passed layer is gone, the next one moves up
    text = (tmp_path / "thin" / "README.md").read_text()
    assert "without 2 of its 4 attention blocks and 1 of its 4 MLP blocks" in text
    assert json.loads((tmp_path / "thin" / "design_point.json").read_text()) == point.to_json()
    stacks = [loaded.topology.stacks_by_name[name] for name, _ in point if name in loaded.topology.stacks_by_name]
    names = {name for name in thin.state_dict() if re.search(r"norm\.right|owned\.right", name)}
    assert len(names) == len(stacks)  # stored once per stack
    assert all(f"{stack.norm}.right.weight" in map(later, names) for stack in stacks if stack.norm)
    again = topology_of(thin)
    assert (again.layer_count, again.parameters_dense) == (3, result.parameters)


def later(name: str) -> str:
    """The name in the dense model of a weight that is in an export without layer 2."""
    return re.sub(r"\.2\.", ".3.", name, count=1)
