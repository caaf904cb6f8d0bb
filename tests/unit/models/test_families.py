"""The topology of every family, checked on tiny random models against their modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, tiny_config, tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dse.models import load_topology, topology_of

HIDDEN, LAYERS, VOCABULARY = (SIZES[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
GATED = {
    "query": ("self_attn.q_proj", 32, 32),
    "key": ("self_attn.k_proj", 16, 32),
    "value": ("self_attn.v_proj", 16, 32),
    "attention_output": ("self_attn.o_proj", 32, 32),
    "gate": ("mlp.gate_proj", 48, 32),
    "up": ("mlp.up_proj", 48, 32),
    "down": ("mlp.down_proj", 32, 48),
}
# The head size is not hidden / heads, so the topology must read it from the matrices.
WIDE_HEADS = GATED | {
    "query": ("self_attn.q_proj", 64, 32),
    "key": ("self_attn.k_proj", 32, 32),
    "value": ("self_attn.v_proj", 32, 32),
    "attention_output": ("self_attn.o_proj", 32, 64),
}
BERT = {
    "query": ("attention.self.query", 32, 32),
    "key": ("attention.self.key", 32, 32),
    "value": ("attention.self.value", 32, 32),
    "attention_output": ("attention.output.dense", 32, 32),
    "intermediate": ("intermediate.dense", 48, 32),
    "output": ("output.dense", 32, 48),
}


Expected = tuple[Callable[[], PreTrainedModel], str, dict[str, tuple[str, int, int]]]
FAMILIES: dict[str, Expected] = {
    "Llama": (partial(tiny_model, "llama"), "model.layers", GATED),
    "Mistral": (partial(tiny_model, "mistral", head_dim=16), "model.layers", WIDE_HEADS),
    "Qwen2": (partial(tiny_model, "qwen2"), "model.layers", GATED),
    "Qwen3": (partial(tiny_model, "qwen3"), "model.layers", WIDE_HEADS),
    "SmolLM3": (partial(tiny_model, "smollm3"), "model.layers", GATED),
    "Gemma": (partial(tiny_model, "gemma"), "model.layers", WIDE_HEADS),
    "Gemma2": (partial(tiny_model, "gemma2"), "model.layers", WIDE_HEADS),
    "Gemma3": (partial(tiny_model, "gemma3_text"), "model.layers", WIDE_HEADS),
    "Olmo": (partial(tiny_model, "olmo"), "model.layers", GATED),
    "Olmo2": (partial(tiny_model, "olmo2"), "model.layers", GATED),
    "Phi3": (
        partial(tiny_model, "phi3"),
        "model.layers",
        {
            "query_key_value": ("self_attn.qkv_proj", 64, 32),
            "attention_output": ("self_attn.o_proj", 32, 32),
            "gate_up": ("mlp.gate_up_proj", 96, 32),
            "down": ("mlp.down_proj", 32, 48),
        },
    ),
    "GPTNeoX": (
        partial(tiny_model, "gpt_neox"),
        "gpt_neox.layers",
        {
            "query_key_value": ("attention.query_key_value", 96, 32),
            "attention_output": ("attention.dense", 32, 32),
            "up": ("mlp.dense_h_to_4h", 48, 32),
            "down": ("mlp.dense_4h_to_h", 32, 48),
        },
    ),
    "GPT2": (
        partial(tiny_model, "gpt2"),
        "transformer.h",
        {
            "query_key_value": ("attn.c_attn", 96, 32),
            "attention_output": ("attn.c_proj", 32, 32),
            "up": ("mlp.c_fc", 48, 32),
            "down": ("mlp.c_proj", 32, 48),
        },
    ),
    "OPT": (
        partial(tiny_model, "opt"),
        "model.decoder.layers",
        {
            "query": ("self_attn.q_proj", 32, 32),
            "key": ("self_attn.k_proj", 32, 32),
            "value": ("self_attn.v_proj", 32, 32),
            "attention_output": ("self_attn.out_proj", 32, 32),
            "up": ("fc1", 48, 32),
            "down": ("fc2", 32, 48),
        },
    ),
    "BertMaskedLM": (partial(tiny_model, "bert"), "bert.encoder.layer", BERT),
    "BertClassifier": (partial(tiny_model, "bert", head="classification"), "bert.encoder.layer", BERT),
    "Roberta": (partial(tiny_model, "roberta"), "roberta.encoder.layer", BERT),
    "DistilBert": (
        partial(tiny_model, "distilbert"),
        "distilbert.transformer.layer",
        {
            "query": ("attention.q_lin", 32, 32),
            "key": ("attention.k_lin", 32, 32),
            "value": ("attention.v_lin", 32, 32),
            "attention_output": ("attention.out_lin", 32, 32),
            "intermediate": ("ffn.lin1", 48, 32),
            "output": ("ffn.lin2", 32, 48),
        },
    ),
}
ENCODERS = {"BertMaskedLM", "BertClassifier", "Roberta", "DistilBert"}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_topology_lists_the_expected_tensors_in_forward_order(family: str) -> None:
    make, block, expected = FAMILIES[family]
    topology = topology_of(make())
    assert topology.layer_count == LAYERS
    assert topology.roles == tuple(expected)
    assert [(t.name, t.module, t.shape) for t in topology.tensors] == [
        (f"layers.{layer}.{role}", f"{block}.{layer}.{path}", (out_features, in_features))
        for layer in range(LAYERS)
        for role, (path, out_features, in_features) in expected.items()
    ]
    assert topology.unmapped == ()
    assert topology.is_decoder == (family not in ENCODERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_projections_of_one_input_form_stacks(family: str) -> None:
    topology = topology_of(FAMILIES[family][0]())
    roles = FAMILIES[family][2]
    expected = [
        f"layers.{layer}.{stack}"
        for layer in range(LAYERS)
        for stack, members in {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}.items()
        if all(member in roles for member in members)
    ]
    assert [stack.name for stack in topology.stacks] == expected


def test_tensors_match_their_modules(family: str) -> None:
    model = FAMILIES[family][0]()
    for tensor in topology_of(model).tensors:
        module = model.get_submodule(tensor.module)
        x = torch.zeros(1, tensor.in_features)
        assert module(x).shape == (1, tensor.out_features)
        if tensor.kind == "conv1d":
            assert type(module) is Conv1D
            assert tuple(module.weight.shape) == (tensor.in_features, tensor.out_features)
        else:
            assert type(module) is nn.Linear
            assert tuple(module.weight.shape) == tensor.shape
        assert tensor.has_bias == (module.bias is not None)


def test_parameters_are_counted_once_by_storage(family: str) -> None:
    model = FAMILIES[family][0]()
    topology = topology_of(model)
    # Count again by the memory of the saved tensors; tied ones share it.
    by_pointer = {p.data_ptr(): p.numel() for _, p in model.named_parameters(remove_duplicate=False)}
    assert topology.parameters_dense == sum(by_pointer.values())
    assert topology.bytes_per_parameter == 4.0
    saved = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [t for name, t in model.state_dict().items() if name not in saved]
    assert topology.buffers_bytes == sum(t.numel() * t.element_size() for t in buffers)


def test_matrices_sum_to_the_flops_of_a_forward_pass(family: str) -> None:
    """2 x (layers + other + head) must equal torch's own count without attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = FAMILIES[family][0]().eval()
    topology, tokens = topology_of(model), 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long))
    matmul = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if str(operator) in ("aten.mm", "aten.addmm")
    )
    entries = sum(t.parameters for t in topology.tensors) + topology.other_matmul_parameters + topology.head_parameters
    expected = 2 * tokens * entries
    if family == "BertClassifier":  # the pooler and the classifier read one token per sequence
        expected += 2 * (HIDDEN * HIDDEN + 2 * HIDDEN)
    assert matmul == expected


def test_attention_widths_come_from_the_matrices(family: str) -> None:
    topology = topology_of(FAMILIES[family][0]())
    expected = FAMILIES[family][2]
    assert topology.attention_width == expected["attention_output"][2]
    key_value = {"Phi3": 16, "GPTNeoX": 32, "GPT2": 32}.get(family) or expected["key"][1]
    assert topology.key_value_width == key_value


def test_a_config_alone_is_enough_for_the_topology(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family][0]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert load_topology(str(tmp_path)) == topology_of(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_tied_heads_count_once_as_parameters_but_add_flops(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(name, tie_word_embeddings=tied)
    topology = topology_of(model)
    embedding = VOCABULARY * HIDDEN
    assert topology.head_parameters == embedding
    other = topology_of(tiny_model(name, tie_word_embeddings=not tied))
    assert topology.parameters_dense - other.parameters_dense == (-embedding if tied else embedding)
    model.config.save_pretrained(tmp_path)
    assert load_topology(str(tmp_path)).parameters_dense == topology.parameters_dense


def test_the_class_is_found_without_architectures_in_the_config(tmp_path: Path) -> None:
    for config, expected in (
        (tiny_config("llama"), "LlamaForCausalLM"),
        (tiny_config("bert"), "BertForMaskedLM"),
        (tiny_config("bert", is_decoder=True), "BertLMHeadModel"),
    ):
        data = config.to_dict()
        data.pop("architectures", None)
        (tmp_path / "config.json").write_text(json.dumps(data))
        assert load_topology(str(tmp_path)).architecture == expected
