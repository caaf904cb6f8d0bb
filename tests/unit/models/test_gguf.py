"""GGUF files through transformers: a tiny file with known weights, written here."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf

from dse.models import load_model, load_topology, model_fingerprint, topology_of

HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 4, 2, 8


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's row order of queries and keys: the two rows of a rotation are adjacent."""
    return weight.reshape(heads, 2, HEAD_SIZE // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: hf.LlamaForCausalLM, file: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = ["<unk>", "<s>", "</s>", *"abcdefghijkl", "ab"]
    assert len(letters) == config.vocab_size
    writer.add_token_list(letters)
    writer.add_token_types([3, 3, 3] + [1] * (len(letters) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = model.state_dict()
    plain = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for i in range(config.num_hidden_layers):
        for ours, theirs in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            plain[f"blk.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
        for ours, theirs, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KEY_VALUE_HEADS)):
            rotated = permuted(weights[f"model.layers.{i}.self_attn.{theirs}.weight"], heads)
            writer.add_tensor(f"blk.{i}.{ours}.weight", rotated.contiguous().numpy())
    for name, source in plain.items():
        writer.add_tensor(name, weights[source].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tiny_llama: hf.LlamaForCausalLM, tmp_path: Path) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(tiny_llama, folder / "tiny.gguf")
    return folder / "tiny.gguf"


def test_weights_tying_and_logits_are_preserved(gguf_file: Path, tiny_llama: hf.LlamaForCausalLM) -> None:
    loaded = load_model(str(gguf_file))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.topology == topology_of(tiny_llama)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected = tiny_llama.eval()(input_ids=tokens).logits
        assert torch.allclose(loaded.model(input_ids=tokens).logits, expected, atol=1e-6)
    assert not loaded.model.training
    assert loaded.tokenizer.decode([3, 4, 15]) == "abab"


def test_a_folder_with_one_gguf_file_loads_like_the_file(gguf_file: Path) -> None:
    by_file, by_folder = load_model(str(gguf_file)), load_model(str(gguf_file.parent))
    assert by_file.fingerprint == by_folder.fingerprint
    assert load_topology(str(gguf_file.parent)) == by_file.topology


def test_the_model_has_the_requested_dtype(gguf_file: Path) -> None:
    loaded = load_model(str(gguf_file), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.topology == load_topology(str(gguf_file), dtype="bfloat16")


def test_the_model_can_be_saved_as_safetensors(gguf_file: Path, tmp_path: Path) -> None:
    loaded = load_model(str(gguf_file))
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert model_fingerprint(again.model) == loaded.fingerprint
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_loading_prints_nothing_and_restores_the_reader(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reader = gguf.GGUFReader
    load_model(str(gguf_file))
    assert gguf.GGUFReader is reader
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
