"""Weights written tensor by tensor are read back bit-identical by safetensors and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from dse.export.weights import model_bytes, stored_names, write_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_file_holds_the_weights_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family).to(dtype)
    write_weights(model, tmp_path)
    found, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert found.keys() == set(stored_names(model))
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in found)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "model.safetensors").stat().st_size == 8 + header + model_bytes(model)
    model.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    probe = torch.arange(3, 9)[None]
    assert torch.equal(again(probe).logits, model(probe).logits)


def test_shards_hold_every_weight_once(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_weights(model, tmp_path, max_shard_size=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {name: (tensor, file.name) for file in files for name, tensor in load_file(file).items()}
    assert {name: file for name, (_, file) in found.items()} == index["weight_map"]
    assert all(torch.equal(found[name][0], tensor) for name, tensor in model.state_dict().items() if name in found)


def test_views_and_mixed_dtypes_are_written_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    layer = model.model.layers[0].mlp
    whole = torch.randn(96, 32)
    layer.gate_proj.weight, layer.up_proj.weight = (
        nn.Parameter(part, requires_grad=False) for part in (whole[::2], whole[1::2])
    )
    model.register_buffer("seven", torch.tensor(7, dtype=torch.int64))
    model.register_buffer("narrow", torch.ones(3, dtype=torch.float16))
    write_weights(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items() if name in found)
    assert int(found["seven"]) == 7
    assert found["narrow"].dtype == torch.float16
