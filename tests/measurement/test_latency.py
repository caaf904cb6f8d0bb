from __future__ import annotations

import time

import pytest
import torch

from dse.errors import ConfigError, OutOfMemoryError
from dse.measurement import LatencySpec, measure_latency
from dse.measurement.out_of_memory import bytes_asked

SPEC = LatencySpec(prompt_tokens=8, new_tokens=3, blocks=2, warmup_blocks=1)


class SlowSide:
    """Swaps a sleep in and out of a model's forward, and notes the order."""

    def __init__(self, model, subject_s, dense_s):
        self.side = None
        self.calls = []
        self.timed = []
        self.sleep_s = {"subject": subject_s, "dense": dense_s}
        model.register_forward_pre_hook(self.sleep, with_kwargs=True)

    def sleep(self, _module, _args, kwargs):
        tokens = kwargs["input_ids"].shape[1]
        cache = kwargs.get("past_key_values")
        if tokens > 1 or cache is not None:
            self.timed.append((self.side, tokens))
        time.sleep(self.sleep_s[self.side])

    def use_subject(self):
        assert self.side != "subject", "a side that is in use must not be put in again"
        self.side = "subject"
        self.calls.append("subject")

    def use_dense(self):
        assert self.side != "dense"
        self.side = "dense"
        self.calls.append("dense")


def test_order_is_abba_and_every_sample_is_a_generation(llama):
    slow = SlowSide(llama, 0, 0)
    progress = []
    result = measure_latency(
        llama,
        SPEC,
        use_subject=slow.use_subject,
        use_dense=slow.use_dense,
        progress=lambda *step: progress.append(step),
    )
    blocks = SPEC.blocks + SPEC.warmup_blocks
    prefills = [side for side, tokens in slow.timed if tokens == SPEC.prompt_tokens]
    assert prefills == ["subject", "dense", "dense", "subject"] * blocks
    one = [SPEC.prompt_tokens] + [1] * SPEC.new_tokens
    assert [tokens for _, tokens in slow.timed] == one * 4 * blocks
    # Swaps only where the side changes: once to begin, then twice a block.
    assert slow.calls == ["subject"] + ["dense", "subject"] * blocks
    assert progress == [(done, 4 * blocks) for done in range(1, 4 * blocks + 1)]
    assert (result.repeats, result.prefill.subject.count, result.prefill.dense.count) == (4, 4, 4)
    assert (result.device, result.clock, result.warmup_blocks) == ("cpu", "perf_counter_ns", 1)
    assert result.is_valid == (not result.reason)


def test_a_subject_twice_as_slow_has_ratio_two(llama):
    # Sleeps of 40 and 20 ms drown the few milliseconds of the tiny model and of a busy machine.
    slow = SlowSide(llama, 0.04, 0.02)
    spec = LatencySpec(prompt_tokens=8, new_tokens=2, blocks=2, warmup_blocks=0)
    result = measure_latency(llama, spec, use_subject=slow.use_subject, use_dense=slow.use_dense)
    assert result.decode is not None
    for phase in (result.prefill, result.decode):
        # On a busy machine sleeps overrun, which draws the ratio towards 1; timings must not decide the test.
        assert 1.0 < phase.ratio < 4.0
        assert phase.ratio_low <= phase.ratio <= phase.ratio_high
        # Decode is seconds per token, not per generation; prefill is one pass.
        assert 0.02 <= phase.dense.minimum_s < 0.04
        assert 0.04 <= phase.subject.minimum_s < 0.08


def test_dense_against_dense_is_measured_too(llama):
    swaps = []

    def same():
        swaps.append(1)

    result = measure_latency(llama, SPEC, use_subject=same, use_dense=same)
    assert len(swaps) == 1 + 2 * (SPEC.blocks + SPEC.warmup_blocks)
    assert result.decode is not None
    assert 0.05 < result.decode.ratio < 20
    assert result.prefill.ratio_low <= result.prefill.ratio <= result.prefill.ratio_high


def test_encoder_has_prefill_only(bert):
    slow = SlowSide(bert, 0, 0)
    result = measure_latency(bert, SPEC, use_subject=slow.use_subject, use_dense=slow.use_dense)
    assert result.decode is None
    assert [tokens for _, tokens in slow.timed] == [SPEC.prompt_tokens] * 12


def test_a_ratio_without_meaning_is_marked_invalid(llama):
    """Pairs that differ wildly give an interval wider than a factor of 100; the figures stay, marked."""
    naps = iter([0.0, 0.0, 0.3, 0.0, 0.3, 0.0, 0.0, 0.0] * 2)

    def erratic(_module, _args, kwargs):
        if kwargs["input_ids"].shape[1] == 8:
            time.sleep(next(naps))

    llama.register_forward_pre_hook(erratic, with_kwargs=True)
    spec = LatencySpec(prompt_tokens=8, new_tokens=1, blocks=2, warmup_blocks=0)
    result = measure_latency(llama, spec, use_subject=lambda: None, use_dense=lambda: None)
    assert not result.is_valid
    assert "prefill ratio" in result.reason
    assert "factor of 100" in result.reason


def test_context_is_checked_before_anything_runs(llama):
    with pytest.raises(ConfigError, match="<= 64"):
        measure_latency(llama, LatencySpec(prompt_tokens=64), use_subject=lambda: None, use_dense=lambda: None)


def test_out_of_memory_names_the_bytes_asked(llama):
    # A real refusal of torch's own CPU allocator: more than any address space holds.
    asked = 2**60

    def too_much(_module, _inputs):
        torch.empty(asked, dtype=torch.uint8)

    llama.model.layers[0].register_forward_pre_hook(too_much)
    with pytest.raises(OutOfMemoryError, match=f"allocation of {asked} bytes failed"):
        measure_latency(llama, SPEC, use_subject=lambda: None, use_dense=lambda: None)


def test_other_runtime_errors_pass_through(llama):
    def broken(_module, _inputs):
        raise RuntimeError("a shape is wrong")

    llama.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        measure_latency(llama, SPEC, use_subject=lambda: None, use_dense=lambda: None)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of", 20 * 2**30),
        ("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0", 512 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: not enough memory", None),
    ],
)
def test_bytes_asked(message, expected):
    assert bytes_asked(message) == expected
