"""The exported modelling file: self-contained, for any architecture, with the library's own modules, and trainable."""

from __future__ import annotations

import ast
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import tiny_model

from dse.decomposition import expert_modules, low_rank_modules
from dse.export import ExportRequest, stage
from dse.export.modelling_code import auto_classes, modelling_code
from dse.models import removed_modules
from dse.models.transformers_patches import quiet_transformers

CLASSES = [
    (hf.LlamaForCausalLM, hf.LlamaConfig),
    (hf.GPT2LMHeadModel, hf.GPT2Config),
    (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig),
    (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig),
    (hf.BertForSequenceClassification, hf.BertConfig),
]


@pytest.mark.parametrize(("model_class", "config_class"), CLASSES)
def test_the_file_needs_only_torch_and_transformers(model_class: type, config_class: type) -> None:
    source = modelling_code(model_class, config_class)
    tree = ast.parse(source)
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }

    assert imported == {"__future__", "typing", "torch", "transformers"}
    assert source.startswith("# Licensed under the Apache License")
    assert f"class LowRank{model_class.__name__}({model_class.__name__}):" in source
    assert f'model_type = "lowrank-{config_class.model_type}"' in source
    assert model_class is hf.LlamaForCausalLM or "Llama" not in source
    assert len(source.splitlines()) < 340


def definitions(source: str) -> dict[str, str]:
    """Classes and functions of a module by name, as dumped syntax trees."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return {node.name: ast.dump(node) for node in nodes}


def test_exported_modules_are_the_librarys_own() -> None:
    exported = definitions(modelling_code(hf.MixtralForCausalLM, hf.MixtralConfig, has_experts=True))
    library = {}
    for module in (low_rank_modules, expert_modules, removed_modules):
        library |= definitions(inspect.getsource(module))
    assert {name: exported.get(name) for name in library} == library
    assert exported.keys() - library.keys() == {
        "LowRankMixtralConfig",
        "LowRankMixtralForCausalLM",
        "_random",
        "_expert_weight",
    }


def test_a_class_that_transformers_does_not_list_is_imported_from_its_own_module() -> None:
    class Unlisted(hf.LlamaForCausalLM):
        pass

    Unlisted.__module__ = "transformers.models.unlisted.modeling_unlisted"
    source = modelling_code(Unlisted, hf.LlamaConfig)
    assert "from transformers.models.unlisted.modeling_unlisted import Unlisted\n" in source
    assert "from transformers import LlamaConfig\n" in source


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
        loaded.topology[name].module: {"rank": choice.rank, "core": choice.method == "tucker", "bias": False}
        for name, choice in point
    }
    assert config["architectures"] == ["LowRankLlamaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_lowrank.LowRankLlamaForCausalLM"
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
    assert all(g is not None and bool(g.abs().sum() > 0) for name, g in gradients.items() if name.endswith("left"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.step()
    with torch.no_grad():
        assert float(model(input_ids=tokens, labels=tokens).loss) < first


def test_tensor_parallel_plans_of_the_dense_matrices_are_dropped(folder: Path) -> None:
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert tiny_model("llama")._tp_plan
    assert not model._tp_plan


def test_a_pipeline_loads_the_folder(folder: Path) -> None:
    with quiet_transformers():
        speak = hf.pipeline("text-generation", str(folder), trust_remote_code=True)
        said = speak("hello", max_new_tokens=3, do_sample=False)
    assert said[0]["generated_text"].startswith("hello")
