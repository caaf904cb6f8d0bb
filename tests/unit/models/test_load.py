"""Loading from local folders: the result, the errors, and no change of global state."""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model
from transformers.utils import logging as hf_logging

from dse.errors import ModelError, UserError
from dse.models import LoadedModel, load_model, load_topology, topology_of
from dse.models.model_source import resolve


def test_a_saved_model_loads_completely(llama_folder: Path, tiny_llama: hf.LlamaForCausalLM) -> None:
    loaded = load_model(str(llama_folder))
    assert type(loaded.model) is hf.LlamaForCausalLM
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert (loaded.ref, loaded.revision) == (str(llama_folder), None)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    tokens = loaded.tokenizer("the cat sees a dog .", return_tensors="pt")
    assert tokens["input_ids"].tolist() == [[3, 4, 6, 7, 5, 9]]
    with torch.no_grad():
        expected = tiny_llama.eval()(**{"input_ids": tokens["input_ids"]}).logits
        assert torch.equal(loaded.model(input_ids=tokens["input_ids"]).logits, expected)
    assert loaded.topology == topology_of(tiny_llama) == load_topology(str(llama_folder))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_the_model_has_the_requested_dtype(llama_folder: Path, dtype: str, size: int) -> None:
    loaded = load_model(str(llama_folder), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.topology.bytes_per_parameter == size
    assert load_topology(str(llama_folder), dtype=dtype) == loaded.topology


def test_topology_counts_bytes_in_the_dtype_of_the_config(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_topology(str(llama_folder)).bytes_per_parameter == 2
    assert load_model(str(llama_folder)).topology.bytes_per_parameter == 4


@pytest.mark.parametrize(
    ("head", "architecture"),
    [
        ("masked_lm", "BertForMaskedLM"),
        ("classification", "BertForSequenceClassification"),
        ("embedding", "BertModel"),
    ],
)
def test_encoders_load_as_their_saved_class(
    head: str, architecture: str, tmp_path: Path, tokenizer: hf.PreTrainedTokenizerFast
) -> None:
    save_tiny_model(tmp_path, "bert", head=head, tokenizer=tokenizer)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model).__name__ == loaded.topology.architecture == architecture
    assert not loaded.topology.is_decoder
    assert loaded.topology.roles == ("query", "key", "value", "attention_output", "intermediate", "output")


def test_role_names_reach_the_topology(llama_folder: Path) -> None:
    names = {"mlp.gate_proj": "valve"}
    assert "valve" in load_model(str(llama_folder), role_names=names).topology.roles
    assert "valve" in load_topology(str(llama_folder), role_names=names).roles


def test_loading_changes_no_global_state(llama_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def state() -> list[object]:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as gguf_module

        return [
            dict(os.environ),
            hf_logging.get_verbosity(),
            hf_logging.is_progress_bar_enabled(),
            logging.getLogger("huggingface_hub").level,
            dict(sys.modules["huggingface_hub.utils.tqdm"].progress_bar_states),
            torch.get_default_dtype(),
            torch.get_default_device(),
            gguf.GGUFReader,
            gguf.get_tensor_name_map,
            vars(gguf_module)["tqdm"],
            hf_logging._tqdm_hook,
            sys.stderr,
        ]

    before = state()
    load_model(str(llama_folder))
    load_topology(str(llama_folder))
    (llama_folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError):
        load_model(str(llama_folder))
    assert state() == before
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def keep(folder: Path) -> None:
    pass


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(*names: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"GGUF" + struct.pack("<I", 3))

    return replace


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "cannot be loaded"),
        (write("model.safetensors", b""), "cannot be loaded"),
        (write("config.json", b'{"model_type": '), "not a valid JSON"),
        (write("config.json", b"[1, 2]"), "cannot be loaded"),
        (write("config.json", b"\xff\xfe"), "cannot be loaded"),
        (write("tokenizer.json", b"{}"), "the tokenizer of .* cannot be loaded"),
        (without("tokenizer.json", "tokenizer_config.json"), "tokenizer.*save_pretrained"),
        (without("model.safetensors"), "must be .safetensors files beside the config.*dse cost"),
        (without("config.json"), "must hold a config.json"),
        (only_pickles, "PyTorch files only, which are never opened"),
        (only_gguf("a.gguf"), "cannot be loaded"),
        (only_gguf("a.gguf", "b.gguf"), "holds a.gguf, b.gguf; name the file itself"),
        (write("adapter_config.json", b"{}"), "is an adapter; merge it"),
        (edit_config(num_hidden_layers=4), "9 are missing .*they would be random"),
        (edit_config(hidden_size=64), "do not have the shapes that its config.json describes"),
        (edit_config(num_attention_heads=0), "ZeroDivisionError"),
        (edit_config(hidden_size="many"), "expected int"),
        (edit_config(model_type="unheard_of"), "unheard_of"),
        (edit_config(architectures=[3], model_type=None), "cannot be loaded"),
        (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised .gptq."),
        (
            edit_config(model_type="new", auto_map={"AutoConfig": "config.New", "AutoModelForCausalLM": "model.New"}),
            "needs its own Python code.*trust_remote_code: true",
        ),
    ],
)
def test_a_damaged_folder_is_reported_in_one_line(
    llama_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(llama_folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(llama_folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(llama_folder))


def test_model_code_runs_only_with_trust_remote_code(llama_folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "the-code-ran"
    (llama_folder / "configuration_new.py").write_text(f"open({str(trace)!r}, 'w')\n")
    edit_config(model_type="new", auto_map={"AutoConfig": "configuration_new.New"})(llama_folder)
    for load in (load_model, load_topology):
        with pytest.raises(ModelError, match="trust_remote_code"):
            load(str(llama_folder))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "must be a hub id"),
        ("   ", "must be a hub id"),
        ("../nope", "nothing is at '../nope'"),
        ("a/b/c", "nothing is at"),
        ("a\0b", "nothing is at"),
        ("missing.gguf", "nothing is at"),
        ("http://example.com/model", "nothing is at"),
        ("x" * 5000, "hub id must be like"),
        ("demo:nope", "must be one of smollm2-135m-instruct"),
        ("demo:smolm2-135m-instruct", "did you mean 'smollm2-135m-instruct'"),
        ("demo-smollm2-135m-instruct/", "did you mean 'demo:smollm2-135m-instruct'"),
        (__file__, "must be a .gguf file"),
        (str(Path(__file__).parent), "must hold a config.json or one .gguf file"),
    ],
)
def test_an_invalid_reference_is_reported_in_one_line(ref: str, message: str) -> None:
    for load in (load_model, load_topology):
        with pytest.raises(ModelError, match=message) as caught:
            load(ref)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_misspelt_folder_gets_a_suggestion(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'tiny-llama'"):
        load_topology(str(llama_folder.parent / "tiny-lama"))


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=40).filter(lambda text: "/" in text or not text.strip(" \t\r\n")).filter(lambda t: ":" not in t)
)
def test_any_text_with_a_slash_resolves_or_is_refused(text: str) -> None:
    # Plain words are excluded: they may be hub ids and would need the network.
    try:
        resolve(f"./no/such/folder/{text}/x")
    except UserError:
        return
    raise AssertionError("nothing can be there")


@pytest.mark.parametrize("dtype", ["float64", "", None, ["float32"], torch.float32])
def test_unsupported_dtypes_are_refused(llama_folder: Path, dtype: str) -> None:
    with pytest.raises(ModelError, match="`dtype` must be one of float32, float16, bfloat16"):
        load_model(str(llama_folder), dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "", "meta", "cuda:-3", "cpu:x"])
def test_unsupported_devices_are_refused(llama_folder: Path, device: str) -> None:
    with pytest.raises(ModelError, match="`device` must"):
        load_model(str(llama_folder), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="sees no CUDA device; use device='cpu'"):
        load_model(str(llama_folder), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_model_is_the_same_on_cuda(llama_folder: Path) -> None:
    on_gpu, on_cpu = load_model(str(llama_folder), device="cuda"), load_model(str(llama_folder))
    assert {parameter.device.type for parameter in on_gpu.model.parameters()} == {"cuda"}
    assert on_gpu.model.lm_head.weight is on_gpu.model.model.embed_tokens.weight
    assert on_gpu.fingerprint == on_cpu.fingerprint
    with pytest.raises(ModelError, match="CUDA devices"):
        load_model(str(llama_folder), device="cuda:99")


def test_a_revision_is_refused_for_local_models(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="revision is for hub models only"):
        load_model(str(llama_folder), revision="main")


def test_the_fingerprint_requires_the_dense_model(llama_folder: Path) -> None:
    first, second = load_model(str(llama_folder)), load_model(str(llama_folder))
    layer = first.model.model.layers[0].mlp
    dense, layer.up_proj = layer.up_proj, torch.nn.Identity()
    with pytest.raises(ModelError, match=r"'layers.0.up' is not dense; undo the point first"):
        _ = first.fingerprint
    layer.up_proj = dense
    assert first.fingerprint == second.fingerprint
    layer.up_proj = torch.nn.Identity()
    assert first.fingerprint == second.fingerprint  # it is cached


def test_the_fingerprint_is_refused_after_weights_changed(llama_folder: Path) -> None:
    loaded: LoadedModel = load_model(str(llama_folder))
    with torch.no_grad():
        loaded.model.model.layers[2].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(ModelError, match="weights were changed"):
        _ = loaded.fingerprint
