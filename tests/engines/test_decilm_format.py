"""`--format decilm`: removed blocks as `DeciLMForCausalLM`, which transformers loads with the code in the folder.

vLLM runs it natively: see `test_exports_in_vllm.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import loaded_tiny_model
from torch import nn

from dse.decomposition import FactorBank
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ExportError
from dse.export import ExportResult, export_point, verify_export
from dse.export.decilm_format import check_decilm, decilm_config
from dse.models import LoadedModel

# Layer 1 loses both blocks, the others one at most.
REMOVED = ("layers.0.mlp", "layers.1.attention", "layers.1.mlp", "layers.2.attention")


def removal(*names: str) -> DesignPoint:
    return DesignPoint.of(dict.fromkeys(names, TensorChoice.removal()))


def exported(loaded: LoadedModel, folder: Path, point: DesignPoint | None = None) -> ExportResult:
    point = removal(*REMOVED) if point is None else point
    bank = FactorBank.build(loaded, [point], folder=folder / "bank")
    return export_point(loaded, point, bank, folder / "decilm", format="decilm")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_transformers_loads_it_with_equal_logits(family: str, tmp_path: Path) -> None:
    settings = {"sliding_window": None} if family == "mistral" else {}
    loaded = loaded_tiny_model(family, num_hidden_layers=4, **settings)
    result = exported(loaded, tmp_path)
    assert result.max_logit_difference is not None
    assert result.max_logit_difference < 1e-5
    config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    blocks = config["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [True, True, False, False]


def test_a_reload_by_dse_verify(tmp_path: Path) -> None:
    result = exported(loaded_tiny_model("llama", num_hidden_layers=4), tmp_path)
    report = verify_export(result.folder, "transformers", trust_remote_code=True)
    assert report.is_valid, report.problem
    assert report.max_difference < 1e-5


def test_each_layer_has_a_width_of_its_own() -> None:
    """Widths are read from the modules, so that a point with reduced widths needs nothing else here."""
    loaded = loaded_tiny_model("llama", num_hidden_layers=2)
    mlp = loaded.model.get_submodule("model.layers.1.mlp")
    mlp.up_proj, mlp.gate_proj = nn.Linear(32, 40, bias=False), nn.Linear(32, 40, bias=False)
    mlp.down_proj = nn.Linear(40, 32, bias=False)
    blocks = decilm_config(loaded.model, loaded.topology, DesignPoint.dense())["block_configs"]
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [48, 40]
    assert {block["attention"]["n_heads_in_group"] for block in blocks} == {2}


def test_other_forms_are_refused_in_one_line() -> None:
    loaded = loaded_tiny_model("llama", num_hidden_layers=2)
    mixed = DesignPoint.of({"layers.1.mlp": TensorChoice.removal(), "layers.0.query": TensorChoice("svd", 2)})
    with pytest.raises(
        ExportError, match=r"removed blocks and widths alone, but it decomposes 1 tensors \(first: 'layers.0.query'\)"
    ):
        check_decilm(loaded, mixed)
    with pytest.raises(ExportError, match="needs attention in the first layer that is left"):
        check_decilm(loaded, removal("layers.0.attention"))
    check_decilm(loaded, removal("layers.0.attention", "layers.0.mlp"))  # the next layer begins with attention
    with pytest.raises(ExportError, match="sliding window"):
        check_decilm(loaded_tiny_model("mistral", sliding_window=8), removal("layers.1.mlp"))
    with pytest.raises(ExportError, match="but got a GPT2LMHeadModel"):
        check_decilm(loaded_tiny_model("gpt2"), removal("layers.1.mlp"))
