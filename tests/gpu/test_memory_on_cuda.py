"""Memory on a GPU: peaks against arithmetic, out of memory, and what the allocator keeps."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from dse.errors import OutOfMemoryError
from dse.measurement import LatencySpec, measure_peak_memory
from dse.out_of_memory import out_of_memory_errors

MIB = 2**20


def test_peaks_hold_the_key_value_cache_of_the_arithmetic(gpu: torch.device) -> None:
    layers, heads, head_size, batch, prompt, new = 8, 4, 128, 16, 1024, 4
    config = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    model = tiny_model("llama", **config, head_dim=head_size, max_position_embeddings=2048).to(gpu, torch.float16)
    spec = LatencySpec(prompt_tokens=prompt, new_tokens=new, batch_size=batch)
    per_token = 2 * layers * heads * head_size * 2
    result = measure_peak_memory(model, spec, kv_cache_bytes_per_token=per_token)
    cache_bytes = per_token * batch * (prompt + new)
    assert result.method == "CUDA allocator statistics"
    assert result.kv_cache_bytes == cache_bytes
    assert result.prefill_rise_bytes >= per_token * batch * prompt
    # A layer's new keys and values stand beside the old ones while the cache grows.
    assert result.decode_rise_bytes is not None
    assert 0.99 * cache_bytes <= result.decode_rise_bytes <= (1 + 2 / layers) * cache_bytes + 16 * MIB
    assert result.peak_bytes == result.weight_bytes + max(result.prefill_rise_bytes, result.decode_rise_bytes)


def test_a_peak_includes_an_activation(gpu: torch.device) -> None:
    model = tiny_model("llama", num_hidden_layers=2).to(gpu)
    spec = LatencySpec(prompt_tokens=16, new_tokens=4)
    plain = measure_peak_memory(model, spec)
    size = 64 * MIB

    def activation(_module: object, _inputs: object) -> None:
        torch.empty(size, dtype=torch.uint8, device=gpu)

    model.model.layers[1].register_forward_pre_hook(activation)
    result = measure_peak_memory(model, spec)
    assert size <= result.prefill_rise_bytes <= plain.prefill_rise_bytes + size + 4 * MIB


def test_out_of_memory_reports_the_requested_bytes(gpu: torch.device) -> None:
    with pytest.raises(OutOfMemoryError) as failure, out_of_memory_errors("allocating one pebibyte"):
        torch.empty(2**50, dtype=torch.uint8, device=gpu)
    assert failure.value.bytes_asked == 2**50


def test_memory_that_the_allocator_keeps_counts_as_free(gpu: torch.device) -> None:
    """Batches of generation must not shrink over a study, whose allocator keeps ever more memory for reuse."""
    from tiny_models import as_loaded

    from dse.evaluation.lm_eval.shared_prefix import SharedPrefixLM

    loaded = as_loaded(tiny_model("llama"))
    scorer = SharedPrefixLM(pretrained=loaded.model.to(gpu), tokenizer=loaded.tokenizer, batch_size=1)
    torch.cuda.empty_cache()
    before = scorer._cache_tokens()
    half = torch.empty(torch.cuda.mem_get_info(gpu)[0] // 2, dtype=torch.uint8, device=gpu)
    del half  # stays in the allocator's cache
    assert torch.cuda.memory_reserved(gpu) > torch.cuda.mem_get_info(gpu)[1] // 4
    after = scorer._cache_tokens()
    torch.cuda.empty_cache()
    assert after == pytest.approx(before, rel=0.05)
