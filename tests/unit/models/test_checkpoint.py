"""Models whose weights stay in the checkpoint's files until they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from dse.models import load_model
from dse.models.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom", "opt", "granitemoe", "bert"])
def test_weights_read_later_are_those_of_a_resident_model(family: str, dtype: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    resident, later = (load_model(str(tmp_path), dtype=dtype, weights_on_disk=on_disk) for on_disk in (False, True))
    assert later.checkpoint is not None
    assert all(parameter.is_meta for parameter in later.model.parameters())
    assert later.fingerprint == resident.fingerprint
    assert later.topology == resident.topology
    later.read_weights()
    assert later.checkpoint is None
    for of in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        found, expected = dict(of(later.model)), dict(of(resident.model))  # type: ignore[operator]
        assert found.keys() == expected.keys()
        assert all(found[name].dtype == expected[name].dtype for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    probe = torch.arange(3, 13)[None]
    assert torch.equal(later.model(probe)[0], resident.model(probe)[0])


def test_shards_are_read_from_their_files(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "one", "llama")
    whole = load_model(str(tmp_path / "one"))
    whole.model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    whole.tokenizer.save_pretrained(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    later = load_model(str(tmp_path / "many"), weights_on_disk=True)
    assert isinstance(later.checkpoint, Checkpoint)
    assert later.fingerprint == whole.fingerprint


def test_weights_are_present_only_inside_the_block(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    later = load_model(str(tmp_path), weights_on_disk=True)
    assert later.checkpoint is not None
    layer = later.model.get_submodule("model.layers.1")
    with later.checkpoint.present(later.model, ["model.layers.1"], "cpu", without=["model.layers.1.mlp"]):
        present = {name for name, parameter in layer.named_parameters() if not parameter.is_meta}
        assert present == {name for name, _ in layer.named_parameters() if not name.startswith("mlp.")}
    assert all(parameter.is_meta for parameter in later.model.parameters())


def test_tied_weights_are_read_once_and_stay_tied(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    later = load_model(str(tmp_path), weights_on_disk=True)
    later.read_weights()
    assert later.model.lm_head.weight is later.model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_layout_that_transformers_converts_is_loaded_into_memory(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    loaded = load_model(str(tmp_path), weights_on_disk=True)
    assert loaded.checkpoint is None
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())
    assert loaded.fingerprint == load_model(str(tmp_path)).fingerprint
