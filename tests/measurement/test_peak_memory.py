from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dse.errors import InvalidMeasurementError
from dse.measurement import LatencySpec, measure_peak_memory
from dse.measurement import memory as memory_module
from dse.measurement.memory import resident_weight_bytes

SPEC = LatencySpec(prompt_tokens=16, new_tokens=2)
MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def test_weights_are_counted_once(llama):
    config = llama.config
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    parameters = config.vocab_size * hidden + 2 * layer + hidden  # tied head: the embedding counts once
    buffers = 2 * (hidden // config.num_attention_heads // 2)  # the rotary frequencies, and their original
    assert resident_weight_bytes(llama) == 4 * (parameters + buffers)


def test_expanded_and_shared_buffers_count_what_they_store():
    module = torch.nn.Module()
    module.register_buffer("expanded", torch.zeros(1, 1000, dtype=torch.float32)[:, :1].expand(500, 1))
    module.register_buffer("first", torch.zeros(64))
    module.register_buffer("again", module.first)
    assert resident_weight_bytes(module) == 500 * 4 + 64 * 4


@on_linux
def test_peak_sees_an_activation_of_64_mib(llama):
    plain = measure_peak_memory(llama, SPEC)

    def activation(_module, _inputs):
        torch.ones(64 * MIB, dtype=torch.uint8)  # written, so resident; freed at once, so only a peak can see it

    llama.model.layers[1].register_forward_pre_hook(activation)
    result = measure_peak_memory(llama, SPEC)
    assert plain.activation_bytes < 32 * MIB
    assert 60 * MIB < result.activation_bytes < 96 * MIB
    assert result.weight_bytes == plain.weight_bytes == resident_weight_bytes(llama)
    assert result.peak_bytes == result.weight_bytes + result.activation_bytes
    assert "VmHWM" in result.method


@on_linux
def test_an_earlier_peak_does_not_leak_in(llama):
    before = torch.ones(256 * MIB, dtype=torch.uint8)
    del before
    assert measure_peak_memory(llama, SPEC).activation_bytes < 64 * MIB


@on_linux
def test_encoder(bert):
    assert measure_peak_memory(bert, SPEC).peak_bytes >= resident_weight_bytes(bert)


def test_a_system_without_proc_says_so(llama, monkeypatch):
    monkeypatch.setattr(memory_module, "_PROCESS", Path("/no-such-proc"))
    with pytest.raises(InvalidMeasurementError, match=r"read from /no-such-proc/status.*peak_memory_bytes"):
        measure_peak_memory(llama, SPEC)
