"""The exported modelling file: self-contained, for any architecture, with the library's own modules, and trainable."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import tiny_model

from dse.decomposition import expert_modules, low_rank_modules
from dse.export import ExportRequest, stage
from dse.export.modelling_code import auto_classes, modelling_code
from dse.models import plain_attributes, removed_modules
from dse.models.transformers_patches import quiet_transformers

CLASSES = [
    (hf.LlamaForCausalLM, hf.LlamaModel, hf.LlamaConfig),
    (hf.GPT2LMHeadModel, hf.GPT2Model, hf.GPT2Config),
    (hf.GPTNeoXForCausalLM, hf.GPTNeoXModel, hf.GPTNeoXConfig),
    (hf.Gemma3ForCausalLM, hf.Gemma3TextModel, hf.Gemma3TextConfig),
    (hf.BertForSequenceClassification, hf.BertModel, hf.BertConfig),
    (hf.BertModel, hf.BertModel, hf.BertConfig),
]


@pytest.mark.parametrize(("model_class", "body_class", "config_class"), CLASSES)
def test_the_file_needs_only_torch_and_transformers(model_class: type, body_class: type, config_class: type) -> None:
    source = modelling_code(model_class, body_class, config_class)
    tree = ast.parse(source)
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }

    assert imported == {"__future__", "collections", "typing", "torch", "transformers"}
    assert source.startswith("# Licensed under the Apache License")
    assert f"class LowRank{body_class.__name__}(LowRankMixin, {body_class.__name__}):" in source
    assert f"class LowRank{model_class.__name__}(LowRankMixin, {model_class.__name__}):" in source
    body = source.partition(f"class LowRank{body_class.__name__}(")[2].partition("\nclass ")[0]
    assert "def forward" not in body  # vLLM compiles the forward method of the base model
    assert f'model_type = "lowrank-{config_class.model_type}"' in source
    assert model_class is hf.LlamaForCausalLM or "Llama" not in source
    assert len(source.splitlines()) < 480


def definitions(source: str) -> dict[str, str]:
    """Classes and functions of a module by name, as dumped syntax trees."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return {node.name: ast.dump(node) for node in nodes}


def test_exported_modules_are_the_librarys_own() -> None:
    code = modelling_code(hf.MixtralForCausalLM, hf.MixtralModel, hf.MixtralConfig, has_experts=True)
    exported = definitions(code)
    library = {}
    for module in (low_rank_modules, expert_modules, plain_attributes, removed_modules):
        library |= definitions(inspect.getsource(module))
    assert {name: exported.get(name) for name in library} == library
    assert exported.keys() - library.keys() == {
        "LowRankMixtralConfig",
        "LowRankMixin",
        "LowRankMixtralModel",
        "LowRankMixtralForCausalLM",
        "tensor_parallel_plan",
        "insert_factors",
        "class_with",
        "remove_blocks",
        "replace",
        "set_all",
        "expert_weight",
        "random_tensor",
    }


def test_a_class_that_transformers_does_not_list_is_imported_from_its_own_module() -> None:
    class Unlisted(hf.LlamaForCausalLM):
        pass

    Unlisted.__module__ = "transformers.models.unlisted.modeling_unlisted"
    source = modelling_code(Unlisted, hf.LlamaModel, hf.LlamaConfig)
    assert "from transformers.models.unlisted.modeling_unlisted import Unlisted\n" in source
    assert "from transformers import LlamaConfig, LlamaModel\n" in source


@pytest.mark.parametrize(
    ("model_class", "config", "expected"),
    [
        (hf.GPT2LMHeadModel, hf.GPT2Config, "AutoModelForCausalLM"),
        (hf.BertForMaskedLM, hf.BertConfig, "AutoModelForMaskedLM"),
        (hf.RobertaForMaskedLM, hf.RobertaConfig, "AutoModelForMaskedLM"),
        (hf.BertForPreTraining, hf.BertConfig, "AutoModelForPreTraining"),
        (hf.BertForTokenClassification, hf.BertConfig, "AutoModelForTokenClassification"),
        (hf.BertModel, hf.BertConfig, "AutoModel"),
    ],
)
def test_the_most_specific_auto_class_comes_first(model_class: type, config: type, expected: str) -> None:
    with torch.device("meta"):
        model = model_class(config(num_hidden_layers=1) if config is not hf.GPT2Config else config(n_layer=1))
    assert auto_classes(model)[0] == expected


@pytest.fixture
def folder(loaded: object, make_point: Callable, make_factors: Callable, tmp_path: Path) -> Path:
    return stage(loaded, ExportRequest(make_point(loaded), tmp_path / "x"), make_factors(loaded)).folder


def test_config_names_every_module_with_its_rank_core_and_bias(
    folder: Path, loaded: object, make_point: Callable
) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    point = make_point(loaded)
    assert config["low_rank"] == {
        loaded.topology[name].module.removeprefix("model."): {
            "rank": choice.rank,
            "core": choice.method == "tucker",
            "bias": False,
        }
        for name, choice in point
    }
    assert config["architectures"] == ["LowRankLlamaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_lowrank.LowRankLlamaForCausalLM"
    assert config["auto_map"]["AutoModel"] == "modeling_lowrank.LowRankLlamaModel"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for transformers 4
    assert config["dtype"] == "float32"
    assert "_name_or_path" not in config


def test_a_model_built_from_the_config_can_be_trained(folder: Path) -> None:
    torch.manual_seed(0)
    with quiet_transformers():
        config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    tokens = torch.randint(4, 320, (2, 9))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    first = float(loss.detach())

    assert math.isfinite(first)
    assert abs(first - math.log(320)) < 1  # untrained, so as good as guessing
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and bool(g.abs().sum() > 0) for name, g in gradients.items() if ".left." in name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.step()
    with torch.no_grad():
        assert float(model(input_ids=tokens, labels=tokens).loss) < first


def test_the_tensor_parallel_plan_splits_factors_like_their_matrix(folder: Path) -> None:
    """Patterns match prefixes, and the first one that matches counts."""
    with quiet_transformers():
        config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    plan = config.base_model_tp_plan

    def style(name: str) -> str:
        return next((style for pattern, style in plan.items() if re.match(pattern, name)), "replicate")

    expected = {
        "self_attn.q_proj": "colwise",
        "self_attn.q_proj.left": "colwise",
        "self_attn.q_proj.right": "replicate",
        "self_attn.q_proj.core": "replicate",
        "self_attn.q_proj.owned.right": "replicate",
        "self_attn.o_proj": "rowwise",
        "self_attn.o_proj.left": "replicate",
        "self_attn.o_proj.core": "replicate",
        "self_attn.o_proj.right": "rowwise",
        "mlp.up_proj.left": "colwise",
        "mlp.down_proj.right": "rowwise",
        "input_layernorm.right": "replicate",
    }
    assert {name: style(f"layers.2.{name}") for name in expected} == expected


def test_parents_have_one_class_for_each_set_of_low_rank_children(folder: Path) -> None:
    """Engines analyse a class once, so dense and low-rank projections must not share one."""
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    first, *rest = model.model.layers
    assert type(first.self_attn).__name__ == type(rest[0].self_attn).__name__ == "LlamaAttention"
    assert type(first.self_attn) is type(tiny_model("llama").model.layers[0].self_attn)
    assert isinstance(rest[0].self_attn, type(first.self_attn))
    assert type(rest[0].self_attn) is type(rest[1].self_attn) is not type(first.self_attn)


def test_a_pipeline_loads_the_folder(folder: Path) -> None:
    with quiet_transformers():
        speak = hf.pipeline("text-generation", str(folder), trust_remote_code=True)
        said = speak("hello", max_new_tokens=3, do_sample=False)
    assert said[0]["generated_text"].startswith("hello")
