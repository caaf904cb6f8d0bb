from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from dse.models import fingerprint, load_model, model_fingerprint


def test_the_fingerprint_is_stable_and_has_sixteen_hexadecimal_digits(tiny_llama: hf.LlamaForCausalLM) -> None:
    first = model_fingerprint(tiny_llama)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert first == model_fingerprint(tiny_llama)


def test_every_weight_changes_the_fingerprint(tiny_llama: hf.LlamaForCausalLM) -> None:
    seen = {model_fingerprint(tiny_llama)}
    for parameter in tiny_llama.parameters():
        with torch.no_grad():
            last = parameter.view(-1)[-1]
            last.copy_(torch.nextafter(last, torch.tensor(10.0)))  # the smallest change a float can make
        fingerprint_now = model_fingerprint(tiny_llama)
        assert fingerprint_now not in seen
        seen.add(fingerprint_now)


def test_swapped_weights_of_equal_shape_differ(tiny_llama: hf.LlamaForCausalLM) -> None:
    before = model_fingerprint(tiny_llama)
    mlp = tiny_llama.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    assert model_fingerprint(tiny_llama) != before


def test_persistent_buffers_change_the_fingerprint(tiny_llama: hf.LlamaForCausalLM) -> None:
    before = model_fingerprint(tiny_llama)
    tiny_llama.register_buffer("passing", torch.ones(3), persistent=False)
    assert model_fingerprint(tiny_llama) == before
    tiny_llama.register_buffer("kept", torch.ones(3))
    with_buffer = model_fingerprint(tiny_llama)
    assert with_buffer != before
    tiny_llama.kept[0] = 2
    assert model_fingerprint(tiny_llama) != with_buffer


def test_the_fingerprint_survives_saving_and_loading(tiny_llama: hf.LlamaForCausalLM, llama_folder: Path) -> None:
    assert load_model(str(llama_folder)).fingerprint == model_fingerprint(tiny_llama)


def test_dtype_and_config_change_the_fingerprint_but_the_origin_does_not(
    tiny_llama: hf.LlamaForCausalLM, llama_folder: Path
) -> None:
    before = model_fingerprint(tiny_llama)
    assert load_model(str(llama_folder), dtype="bfloat16").fingerprint != before
    tiny_llama.config.name_or_path = "elsewhere"
    tiny_llama.config.use_cache = False
    assert model_fingerprint(tiny_llama) == before
    tiny_llama.config.rms_norm_eps = 1e-3
    assert model_fingerprint(tiny_llama) != before


def test_untying_weights_changes_the_fingerprint(tiny_llama: hf.LlamaForCausalLM) -> None:
    before = model_fingerprint(tiny_llama)
    tiny_llama.lm_head.weight = torch.nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    assert model_fingerprint(tiny_llama) != before


@pytest.mark.parametrize("chunk_bytes", [64, 1000])
def test_weights_larger_than_a_chunk_are_read_completely(
    tiny_llama: hf.LlamaForCausalLM, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", chunk_bytes)
    before = model_fingerprint(tiny_llama)
    for position in (0, 100, -1):
        with torch.no_grad():
            tiny_llama.model.layers[1].mlp.down_proj.weight.view(-1)[position] += 1
        after = model_fingerprint(tiny_llama)
        assert after != before
        before = after
