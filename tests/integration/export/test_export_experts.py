"""Exports with Tucker-decomposed experts: they load without dse, and compute and generate like the resident model."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import EXPERT_FAMILIES, tiny_model

from dse.cost import point_cost
from dse.decomposition import FactorBank, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.export import export_point
from dse.export.modelling_code import modelling_code
from dse.models import topology_of
from dse.models.transformers_patches import quiet_transformers

PROMPT = torch.tensor([[5, 9, 120, 33, 7]])
RULES = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(PROMPT)}


def mixed_point() -> DesignPoint:
    """One or both tensors of a layer's experts, also with an expert factor; and matrices with and without a core."""
    return DesignPoint.of(
        {
            "layers.0.expert_down": TensorChoice("tucker", 5),
            "layers.1.expert_gate_up": TensorChoice("tucker", 6, 2),
            "layers.1.expert_down": TensorChoice("tucker", 7, 3),
            "layers.2.expert_gate_up": TensorChoice("tucker", 4),
            "layers.2.expert_down": TensorChoice("tucker", 3),
            "layers.0.query": TensorChoice("svd", 3),
            "layers.1.query": TensorChoice("tucker", 3),
        }
    )


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_both_forms_reload_as_the_decomposed_model(family: str, tmp_path: Path, make_loaded: Callable) -> None:
    loaded, point = make_loaded(tiny_model(family)), mixed_point()
    bank = FactorBank.build(loaded, [point], folder=tmp_path / "bank")

    # Verified in a new process without this package; the rest of the test reads the folders here.
    result = export_point(loaded, point, bank, tmp_path / "low_rank", verify=True)
    export_point(loaded, point, bank, tmp_path / "dense", format="dense", verify=True)

    with quiet_transformers(), torch.inference_mode():
        thin, info = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "low_rank", trust_remote_code=True, output_loading_info=True
        )
        dense, dense_info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
        assert not any(info[key] or dense_info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        generated = thin.eval().generate(PROMPT, **RULES)
        with decompose(loaded, point, bank):
            resident = loaded.model.state_dict()
            assert thin.state_dict().keys() == resident.keys()
            assert all(torch.equal(tensor, resident[name]) for name, tensor in thin.state_dict().items())
            torch.testing.assert_close(thin(PROMPT).logits, loaded.model(PROMPT).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(dense.eval()(PROMPT).logits, loaded.model(PROMPT).logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(generated, loaded.model.generate(PROMPT, **RULES))
    assert type(dense) is type(loaded.model)
    # Dense tensors are unchanged; decomposed ones have the ranks of their factors.
    for tensor in loaded.topology.experts:
        weight = dense.get_submodule(tensor.module).get_parameter(tensor.parameter)
        choice = point.by_name.get(tensor.name)
        if choice is None:
            assert torch.equal(weight, loaded.model.get_submodule(tensor.module).get_parameter(tensor.parameter))
            continue
        for mode, rank in enumerate(tensor.ranks(choice.rank, choice.expert_rank)):
            assert torch.linalg.matrix_rank(weight.movedim(mode, 0).flatten(1), rtol=1e-4) == rank
    low_rank = json.loads((tmp_path / "low_rank" / "config.json").read_text())["low_rank"]
    assert low_rank["layers.1.mlp.experts"]["experts"]["gate_up"] == [2, 6, 6]
    assert "7 of its 18 weight matrices" in (tmp_path / "low_rank" / "README.md").read_text()
    here = point_cost(loaded.topology, point)
    assert sum(p.numel() for p in thin.parameters()) == here.parameters == result.parameters
    # The topology of the reloaded model counts the cost per token of its experts.
    again = point_cost(topology_of(thin), DesignPoint.dense())
    assert again.parameters == here.parameters
    assert again.flops_decode_per_token == here.flops_decode_per_token


def test_only_exports_with_experts_contain_their_code() -> None:
    with_experts = modelling_code(hf.MixtralForCausalLM, hf.MixtralModel, hf.MixtralConfig, has_experts=True)
    without = modelling_code(hf.MixtralForCausalLM, hf.MixtralModel, hf.MixtralConfig)
    assert "TuckerExperts" in with_experts
    assert "xperts" not in without
    names = [node.name for node in ast.parse(without).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert [name for name in names if name not in with_experts] == []
    assert len(without.splitlines()) < len(with_experts.splitlines()) - 60
