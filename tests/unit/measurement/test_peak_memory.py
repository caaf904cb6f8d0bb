from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

import dse.measurement.memory as memory_module
from dse.errors import InvalidMeasurementError, OutOfMemoryError
from dse.measurement import LatencySpec, measure_peak_memory
from dse.measurement.child_process import in_child_process
from dse.measurement.memory import resident_weight_bytes
from dse.out_of_memory import out_of_memory_errors

SPEC = LatencySpec(prompt_tokens=16, new_tokens=2)
MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def test_tied_weights_count_once(llama):
    config = llama.config
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    parameters = config.vocab_size * hidden + 2 * layer + hidden  # tied head: the embedding counts once
    buffers = 2 * (hidden // config.num_attention_heads // 2)  # the rotary frequencies and their original copy
    assert resident_weight_bytes(llama) == 4 * (parameters + buffers)


def test_expanded_and_shared_buffers_count_their_stored_bytes():
    module = torch.nn.Module()
    module.register_buffer("expanded", torch.zeros(1, 1000, dtype=torch.float32)[:, :1].expand(500, 1))
    module.register_buffer("first", torch.zeros(64))
    module.register_buffer("again", module.first)
    assert resident_weight_bytes(module) == 500 * 4 + 64 * 4


@on_linux
def test_the_peak_includes_an_activation_of_64_mib(llama):
    plain = measure_peak_memory(llama, SPEC)

    def activation(_module, _inputs):
        torch.ones(64 * MIB, dtype=torch.uint8)  # written, so resident; freed at once, so only a peak shows it

    llama.model.layers[1].register_forward_pre_hook(activation)
    result = measure_peak_memory(llama, SPEC)
    assert max(plain.prefill_rise_bytes, plain.decode_rise_bytes) < 32 * MIB
    assert 60 * MIB < result.prefill_rise_bytes < 96 * MIB
    assert 60 * MIB < result.decode_rise_bytes < 96 * MIB
    assert result.weight_bytes == plain.weight_bytes == resident_weight_bytes(llama)
    assert result.peak_bytes == result.weight_bytes + max(result.prefill_rise_bytes, result.decode_rise_bytes)
    assert "VmHWM" in result.method
    assert result.kv_cache_bytes is None


@on_linux
def test_prefill_and_decode_have_separate_peaks(llama):
    def activation(_module, given):
        # Above 32 MiB, glibc maps every allocation on its own; smaller ones may reuse resident memory of the heap.
        size = 96 * MIB if given[0].shape[1] > 1 else 48 * MIB
        torch.ones(size, dtype=torch.uint8)

    llama.model.layers[1].register_forward_pre_hook(activation)
    torch.ones(512 * MIB, dtype=torch.uint8)  # an earlier peak of this process must not count
    result = measure_peak_memory(llama, SPEC, kv_cache_bytes_per_token=2 * 2 * 2 * 8 * 4)
    assert 90 * MIB < result.prefill_rise_bytes < 128 * MIB
    assert 45 * MIB < result.decode_rise_bytes < 80 * MIB
    cache = torch.zeros(2, 2, 1, 2, 16 + 2, 8)  # keys and values, layers, batch, heads, tokens, head size
    assert result.kv_cache_bytes == cache.numel() * cache.element_size()


@on_linux
def test_the_key_value_cache_counts_in_both_phases():
    """The cache outweighs everything else here: its arithmetic bounds both rises from below, and decode from above."""
    layers, heads, head_size, batch, prompt, new = 8, 4, 64, 16, 256, 2
    config = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    model = tiny_model("llama", **config, head_dim=head_size, max_position_embeddings=512)
    spec = LatencySpec(prompt_tokens=prompt, new_tokens=new, batch_size=batch)
    per_token = 2 * layers * heads * head_size * 4
    result = measure_peak_memory(model, spec, kv_cache_bytes_per_token=per_token)
    cache_bytes = per_token * batch * (prompt + new)
    assert result.kv_cache_bytes == cache_bytes == 67_633_152
    assert result.prefill_rise_bytes >= 0.98 * cache_bytes
    # A growing cache is copied, and the heap may keep the room of the old keys and values resident.
    assert 0.98 * cache_bytes <= result.decode_rise_bytes <= 2.1 * cache_bytes


@on_linux
def test_a_child_forked_after_threads_were_used_ends_and_reports_its_errors(request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(2)
    big = torch.ones(600, 600)
    big @ big  # starts the thread pool, which a forked child does not inherit
    assert in_child_process(lambda: float((big @ big)[0, 0]), "a product") == 600.0

    def full():
        with out_of_memory_errors("filling up"):
            torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(OutOfMemoryError, match=f"an allocation of {2**60} bytes failed"):
        in_child_process(full, "filling up")
    with pytest.raises(InvalidMeasurementError, match="a test must run to its end, but: 'stop here'"):
        in_child_process(lambda: {}["stop here"], "a test")
    with pytest.raises(InvalidMeasurementError, match=r"must end within 0.2 s"):
        in_child_process(lambda: time.sleep(30), "a nap", time_limit_s=0.2)
    with pytest.raises(OutOfMemoryError, match="the kernel killed its process"):
        in_child_process(lambda: os.kill(os.getpid(), signal.SIGKILL), "a crash")


@on_linux
def test_an_earlier_peak_does_not_count(llama):
    before = torch.ones(256 * MIB, dtype=torch.uint8)
    del before
    assert measure_peak_memory(llama, SPEC).prefill_rise_bytes < 64 * MIB


@on_linux
def test_an_encoder_has_no_decode_rise(bert):
    result = measure_peak_memory(bert, SPEC, kv_cache_bytes_per_token=7)
    assert result.peak_bytes >= resident_weight_bytes(bert)
    assert (result.decode_rise_bytes, result.kv_cache_bytes) == (None, None)


def test_a_system_without_proc_is_refused_with_the_reason(llama, monkeypatch):
    monkeypatch.setattr(memory_module, "_PROCESS", Path("/no-such-proc"))
    with pytest.raises(InvalidMeasurementError, match=r"read from /no-such-proc/status.*peak_memory_bytes"):
        measure_peak_memory(llama, SPEC)
