from __future__ import annotations

import itertools
import random

import pytest
import torch

from dse.errors import ConfigError, InvalidMeasurementError, OutOfMemoryError
from dse.measurement import LatencySpec, measure_latency
from dse.measurement.alternation import turn_lengths
from dse.measurement.clock import Stopwatch
from dse.out_of_memory import bytes_asked

SPEC = LatencySpec(prompt_tokens=8, new_tokens=6, blocks=3, warmup_blocks=1)


class ScriptedStopwatch(Stopwatch):
    """Runs the work and returns scripted seconds, so that no test depends on the speed of the machine.

    Args:
        swap: Records whose weights are in place.
        seconds: From (variant, phase, number of the call) to the seconds to return.
    """

    source = "script"

    def __init__(self, swap, seconds):
        self.swap = swap
        self.seconds = seconds
        self.calls = 0

    def time(self, work):
        before = len(self.swap.timed)
        result = work()
        ((variant, tokens),) = self.swap.timed[before:]  # exactly one forward pass per timing
        phase = "prefill" if tokens > 1 else "decode"
        self.calls += 1
        return result, self.seconds(variant, phase, self.calls)


class RecordingSwap:
    """Records every swap, and every forward pass of a generation."""

    def __init__(self, model):
        self.variant = None
        self.swaps = []
        self.timed = []
        model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _module, _args, kwargs):
        self.timed.append((self.variant, kwargs["input_ids"].shape[1]))

    def use_candidate(self):
        assert self.variant != "candidate", "the candidate must not be put in place twice"
        self.variant = "candidate"
        self.swaps.append("candidate")

    def use_baseline(self):
        assert self.variant != "baseline", "the baseline must not be put in place twice"
        self.variant = "baseline"
        self.swaps.append("baseline")


def measure(model, spec, seconds=lambda variant, phase, call: 1.0, **options):
    swap = RecordingSwap(model)
    stopwatch = ScriptedStopwatch(swap, seconds)
    return measure_latency(model, spec, swap, stopwatch=stopwatch, **options), swap


def test_order_is_abba_and_every_sample_belongs_to_a_generation(llama):
    progress = []
    result, swap = measure(llama, SPEC, progress=lambda *step: progress.append(step))
    blocks = SPEC.blocks + SPEC.warmup_blocks
    prefill = [("candidate", 8)] * 2 + [("baseline", 8)] * 2
    turn = {variant: [(variant, 1)] * 3 for variant in ("candidate", "baseline")}  # 6 tokens: two turns of three
    generation = turn["candidate"] + turn["baseline"] + turn["baseline"] + turn["candidate"]
    assert swap.timed[0] == ("candidate", 1)  # only a forward pass can tell whether the model has a cache
    assert swap.timed[1:] == (prefill + generation + prefill[::-1] + generation) * blocks
    runs = [variant for variant, _ in itertools.groupby(variant for variant, _ in swap.timed)]
    assert swap.swaps == runs  # swaps only when the variant changes, and the candidate is in place at the end
    assert swap.variant == "candidate"
    assert progress == [(done, 4 * blocks) for done in range(1, 4 * blocks + 1)]
    assert (result.repeats, result.prefill.candidate.count, result.prefill.blocks) == (12, 12, 3)
    assert (result.decode.baseline.count, result.decode.blocks) == (36, 6)
    assert (result.device, result.clock, result.mode) == ("cpu", "script", "eager")
    assert (result.warmup_blocks, result.is_warm, result.is_valid, result.reason) == (1, True, True, "")
    assert result.duration_s == SPEC.blocks * (8 + 4 * 6)


@pytest.mark.parametrize(
    ("tokens", "turns"), [(1, (1,)), (2, (1, 1)), (3, (2, 1)), (8, (4, 4)), (9, (3, 2, 2, 2)), (16, (4,) * 4)]
)
def test_turns_are_short_even_in_length_and_complete(tokens, turns):
    assert turn_lengths(tokens) == turns


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
def test_a_candidate_twice_as_slow_has_ratio_two(llama, new_tokens):
    seconds = {("candidate", "prefill"): 0.8, ("baseline", "prefill"): 0.4, ("candidate", "decode"): 0.06}
    spec = LatencySpec(prompt_tokens=8, new_tokens=new_tokens, blocks=2, warmup_blocks=0)
    result, _ = measure(llama, spec, lambda variant, phase, call: seconds.get((variant, phase), 0.03))
    for phase, baseline_s in ((result.prefill, 0.4), (result.decode, 0.03)):
        assert (phase.ratio, phase.ratio_low, phase.ratio_high) == pytest.approx((2, 2, 2))
        assert phase.baseline.median_s == pytest.approx(baseline_s)  # decode: seconds per token, not per generation
        assert phase.candidate.median_s == pytest.approx(2 * baseline_s)


def test_linear_drift_and_short_bursts_do_not_move_the_ratio(llama):
    def drifting(variant, phase, call):
        burst = 50.0 if call % 37 == 0 else 1.0  # one token of a turn now and then
        return (0.9 if variant == "candidate" else 1.0) * (1 + 2e-4 * call) * (burst if phase == "decode" else 1.0)

    result, _ = measure(llama, LatencySpec(prompt_tokens=8, new_tokens=16, blocks=4), drifting)
    assert result.decode.ratio == pytest.approx(0.9, rel=1e-3)
    assert result.prefill.ratio == pytest.approx(0.9, rel=0.02)  # prefill turns of a block are one generation apart
    assert result.decode.candidate.outliers + result.decode.baseline.outliers == 5  # counted, and part of the spread
    assert result.decode.candidate.p99_s > 10 * result.decode.candidate.median_s


def test_warm_up_ends_when_two_successive_blocks_agree(llama):
    def warming(variant, phase, call):
        return 1 + 2 ** -((call - 1) // 32)  # a block has 32 calls: 2, 1.5, 1.25, 1.125, ...

    result, _ = measure(llama, LatencySpec(prompt_tokens=8, new_tokens=6, blocks=2, warmup_blocks=0), warming)
    # 1.25 to 1.125 is the first step of at most ten per cent.
    assert (result.warmup_blocks, result.is_warm) == (2, True)
    assert result.prefill.baseline.maximum_s == 1.25
    spec = LatencySpec(prompt_tokens=8, new_tokens=6, blocks=2, warmup_blocks=0, max_warmup_blocks=1)
    result, _ = measure(llama, spec, warming)
    assert (result.warmup_blocks, result.is_warm) == (1, False)  # reported if the limit ends the warm-up


def test_blocks_are_added_until_duration_and_precision_are_reached(llama):
    spec = {"prompt_tokens": 8, "new_tokens": 6, "blocks": 2, "warmup_blocks": 0}
    result, _ = measure(llama, LatencySpec(**spec, min_duration_s=100, max_duration_s=200))
    assert result.duration_s == 128  # four blocks of 32 timings of one second

    def noisy(variant, phase, call):
        return 1 + 0.3 * random.Random(31 * call).random()

    wide, _ = measure(llama, LatencySpec(**spec), noisy)
    precise, _ = measure(llama, LatencySpec(**spec, precision=0.02, max_duration_s=5000), noisy)
    assert wide.prefill.blocks == 2
    assert precise.prefill.blocks > 2
    for phase in (precise.prefill, precise.decode):
        assert phase.ratio_high - phase.ratio_low <= 2 * 0.02 * phase.ratio * 1.1
    limited, _ = measure(llama, LatencySpec(**spec, precision=1e-9, max_duration_s=200), noisy)
    assert 200 <= limited.duration_s < 250  # the limit ends a measurement that can never be precise


def test_a_clock_that_stands_still_is_refused(llama):
    with pytest.raises(InvalidMeasurementError, match="32 of 32 timings by script were not"):
        measure(llama, SPEC, lambda variant, phase, call: 0.0)


def test_the_real_clock_measures_dense_against_dense(llama, dense_swap):
    spec = LatencySpec(prompt_tokens=8, new_tokens=2, blocks=2, warmup_blocks=0)
    result = measure_latency(llama, spec, dense_swap)
    assert result.clock == "perf_counter_ns"
    assert result.decode.baseline.minimum_s > 0
    assert result.prefill.ratio_low <= result.prefill.ratio_high


def test_an_encoder_has_prefill_only(bert):
    result, swap = measure(bert, SPEC)
    assert result.decode is None
    assert [tokens for _, tokens in swap.timed[1:]] == [SPEC.prompt_tokens] * 32


def test_a_ratio_with_an_excessive_interval_is_marked_invalid(llama, monkeypatch):
    """Blocks that differ wildly give an interval wider than a factor of 100; the values are kept but marked."""
    monkeypatch.setattr("dse.measurement.latency.MAX_INTERVAL_FACTOR", 100.0)  # other tests have no limit
    factor = {0: 1.0, 1: 1e4, 2: 1e-4}

    def erratic(variant, phase, call):
        return factor[call // 32 % 3] if (variant, phase) == ("candidate", "prefill") else 1.0

    spec = LatencySpec(prompt_tokens=8, new_tokens=6, blocks=4, warmup_blocks=0, max_warmup_blocks=0)
    result, _ = measure(llama, spec, erratic)
    assert not result.is_valid
    assert "prefill ratio" in result.reason
    assert "factor of 100" in result.reason


def test_the_context_length_is_checked_before_anything_runs(llama, dense_swap):
    with pytest.raises(ConfigError, match="<= 64"):
        measure_latency(llama, LatencySpec(prompt_tokens=64), dense_swap)


def test_out_of_memory_reports_the_requested_bytes(llama, dense_swap):
    # A real failure of torch's own CPU allocator: more than any address space holds.
    asked = 2**60

    def too_much(_module, _inputs):
        torch.empty(asked, dtype=torch.uint8)

    llama.model.layers[0].register_forward_pre_hook(too_much)
    with pytest.raises(OutOfMemoryError, match=f"allocation of {asked} bytes failed"):
        measure_latency(llama, SPEC, dense_swap)


def test_other_runtime_errors_propagate(llama, dense_swap):
    def broken(_module, _inputs):
        raise RuntimeError("a shape is wrong")

    llama.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        measure_latency(llama, SPEC, dense_swap)


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
