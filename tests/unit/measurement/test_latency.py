from __future__ import annotations

import itertools
import random

import pytest
import torch

from dse.errors import ConfigError, InvalidMeasurementError, OutOfMemoryError
from dse.measurement import LatencySpec, measure_latency
from dse.measurement.alternation import turns_of
from dse.measurement.clock import Stopwatch
from dse.measurement.out_of_memory import bytes_asked

SPEC = LatencySpec(prompt_tokens=8, new_tokens=6, blocks=3, warmup_blocks=1)


class ScriptedStopwatch(Stopwatch):
    """Runs the work and says what the script has for it: no test here depends on the machine's speed.

    Args:
        sides: Tells whose weights are in place.
        seconds: From (side, phase, number of the call) to the seconds told.
    """

    source = "script"

    def __init__(self, sides, seconds):
        self.sides = sides
        self.seconds = seconds
        self.calls = 0

    def time(self, work):
        before = len(self.sides.timed)
        result = work()
        ((side, tokens),) = self.sides.timed[before:]  # one forward pass a timing, never more
        phase = "prefill" if tokens > 1 else "decode"
        self.calls += 1
        return result, self.seconds(side, phase, self.calls)


class Sides:
    """Notes which side is in use and every forward pass that belongs to a generation."""

    def __init__(self, model):
        self.side = None
        self.swaps = []
        self.timed = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _module, _args, kwargs):
        self.timed.append((self.side, kwargs["input_ids"].shape[1]))

    def use_candidate(self):
        assert self.side != "subject", "a side that is in use must not be put in again"
        self.side = "subject"
        self.swaps.append("subject")

    def use_baseline(self):
        assert self.side != "dense"
        self.side = "dense"
        self.swaps.append("dense")


def measure(model, spec, seconds=lambda side, phase, call: 1.0, **options):
    sides = Sides(model)
    stopwatch = ScriptedStopwatch(sides, seconds)
    result = measure_latency(
        model, spec, use_candidate=sides.use_candidate, use_baseline=sides.use_baseline, stopwatch=stopwatch, **options
    )
    return result, sides


def test_order_is_abba_and_every_sample_is_of_a_generation(llama):
    progress = []
    result, sides = measure(llama, SPEC, progress=lambda *step: progress.append(step))
    blocks = SPEC.blocks + SPEC.warmup_blocks
    prefill = [("subject", 8)] * 2 + [("dense", 8)] * 2
    turn = {side: [(side, 1)] * 3 for side in ("subject", "dense")}  # 6 tokens: two turns of three
    generation = turn["subject"] + turn["dense"] + turn["dense"] + turn["subject"]
    assert sides.timed[0] == ("subject", 1)  # whether the model has a cache only a pass can tell
    assert sides.timed[1:] == (prefill + generation + prefill[::-1] + generation) * blocks
    runs = [side for side, _ in itertools.groupby(side for side, _ in sides.timed)]
    assert sides.swaps == runs  # swaps only where the side changes, and the subject is in place at the end
    assert sides.side == "subject"
    assert progress == [(done, 4 * blocks) for done in range(1, 4 * blocks + 1)]
    assert (result.repeats, result.prefill.subject.count, result.prefill.blocks) == (12, 12, 3)
    assert (result.decode.dense.count, result.decode.blocks) == (36, 6)
    assert (result.device, result.clock, result.mode) == ("cpu", "script", "eager")
    assert (result.warmup_blocks, result.is_warm, result.is_valid, result.reason) == (1, True, True, "")
    assert result.duration_s == SPEC.blocks * (8 + 4 * 6)


@pytest.mark.parametrize(
    ("tokens", "turns"), [(1, (1,)), (2, (1, 1)), (3, (2, 1)), (8, (4, 4)), (9, (3, 2, 2, 2)), (16, (4,) * 4)]
)
def test_turns_are_short_even_and_complete(tokens, turns):
    assert turns_of(tokens) == turns


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
def test_a_subject_twice_as_slow_has_ratio_two(llama, new_tokens):
    seconds = {("subject", "prefill"): 0.8, ("dense", "prefill"): 0.4, ("subject", "decode"): 0.06}
    spec = LatencySpec(prompt_tokens=8, new_tokens=new_tokens, blocks=2, warmup_blocks=0)
    result, _ = measure(llama, spec, lambda side, phase, call: seconds.get((side, phase), 0.03))
    for phase, dense_s in ((result.prefill, 0.4), (result.decode, 0.03)):
        assert (phase.ratio, phase.ratio_low, phase.ratio_high) == pytest.approx((2, 2, 2))
        assert phase.dense.median_s == pytest.approx(dense_s)  # decode: seconds a token, not a generation
        assert phase.subject.median_s == pytest.approx(2 * dense_s)


def test_a_machine_that_slows_down_linearly_or_for_a_moment_does_not_move_the_ratio(llama):
    def drifting(side, phase, call):
        burst = 50.0 if call % 37 == 0 else 1.0  # one token in a turn now and then
        return (0.9 if side == "subject" else 1.0) * (1 + 2e-4 * call) * (burst if phase == "decode" else 1.0)

    result, _ = measure(llama, LatencySpec(prompt_tokens=8, new_tokens=16, blocks=4), drifting)
    assert result.decode.ratio == pytest.approx(0.9, rel=1e-3)
    assert result.prefill.ratio == pytest.approx(0.9, rel=0.02)  # its turns of a block lie a generation apart
    assert result.decode.subject.outliers + result.decode.dense.outliers == 5  # counted, and in the spread
    assert result.decode.subject.p99_s > 10 * result.decode.subject.median_s


def test_warm_up_ends_when_two_successive_blocks_agree(llama):
    def warming(side, phase, call):
        return 1 + 2 ** -((call - 1) // 32)  # a block is 32 calls: 2, 1.5, 1.25, 1.125, ...

    result, _ = measure(llama, LatencySpec(prompt_tokens=8, new_tokens=6, blocks=2, warmup_blocks=0), warming)
    # 1.25 to 1.125 is the first step of no more than a tenth.
    assert (result.warmup_blocks, result.is_warm) == (2, True)
    assert result.prefill.dense.maximum_s == 1.25
    spec = LatencySpec(prompt_tokens=8, new_tokens=6, blocks=2, warmup_blocks=0, max_warmup_blocks=1)
    result, _ = measure(llama, spec, warming)
    assert (result.warmup_blocks, result.is_warm) == (1, False)  # said, where the limit ended it


def test_blocks_are_added_until_time_and_precision_are_reached(llama):
    spec = {"prompt_tokens": 8, "new_tokens": 6, "blocks": 2, "warmup_blocks": 0}
    result, _ = measure(llama, LatencySpec(**spec, min_duration_s=100, max_duration_s=200))
    assert result.duration_s == 128  # four blocks of 32 timings of one second

    def noisy(side, phase, call):
        return 1 + 0.3 * random.Random(31 * call).random()

    wide, _ = measure(llama, LatencySpec(**spec), noisy)
    precise, _ = measure(llama, LatencySpec(**spec, precision=0.02, max_duration_s=5000), noisy)
    assert wide.prefill.blocks == 2
    assert precise.prefill.blocks > 2
    for phase in (precise.prefill, precise.decode):
        assert phase.ratio_high - phase.ratio_low <= 2 * 0.02 * phase.ratio * 1.1
    limited, _ = measure(llama, LatencySpec(**spec, precision=1e-9, max_duration_s=200), noisy)
    assert 200 <= limited.duration_s < 250  # the limit ends what can never be precise


def test_a_clock_that_stands_still_is_refused(llama):
    with pytest.raises(InvalidMeasurementError, match="32 of 32 timings by script were not"):
        measure(llama, SPEC, lambda side, phase, call: 0.0)


def test_the_real_clock_measures_dense_against_dense(llama):
    spec = LatencySpec(prompt_tokens=8, new_tokens=2, blocks=2, warmup_blocks=0)
    result = measure_latency(llama, spec, use_candidate=lambda: None, use_baseline=lambda: None)
    assert result.clock == "perf_counter_ns"
    assert result.decode.dense.minimum_s > 0
    assert result.prefill.ratio_low <= result.prefill.ratio_high


def test_encoder_has_prefill_only(bert):
    result, sides = measure(bert, SPEC)
    assert result.decode is None
    assert [tokens for _, tokens in sides.timed[1:]] == [SPEC.prompt_tokens] * 32


def test_a_ratio_without_meaning_is_marked_invalid(llama, monkeypatch):
    """Blocks that differ wildly give an interval wider than a factor of 100; the figures stay, marked."""
    monkeypatch.setattr("dse.measurement.latency.MAX_INTERVAL_FACTOR", 100.0)  # no limit in other tests
    factor = {0: 1.0, 1: 1e4, 2: 1e-4}

    def erratic(side, phase, call):
        return factor[call // 32 % 3] if (side, phase) == ("subject", "prefill") else 1.0

    spec = LatencySpec(prompt_tokens=8, new_tokens=6, blocks=4, warmup_blocks=0, max_warmup_blocks=0)
    result, _ = measure(llama, spec, erratic)
    assert not result.is_valid
    assert "prefill ratio" in result.reason
    assert "factor of 100" in result.reason


def test_context_is_checked_before_anything_runs(llama):
    with pytest.raises(ConfigError, match="<= 64"):
        measure_latency(llama, LatencySpec(prompt_tokens=64), use_candidate=lambda: None, use_baseline=lambda: None)


def test_out_of_memory_names_the_bytes_asked(llama):
    # A real refusal of torch's own CPU allocator: more than any address space holds.
    asked = 2**60

    def too_much(_module, _inputs):
        torch.empty(asked, dtype=torch.uint8)

    llama.model.layers[0].register_forward_pre_hook(too_much)
    with pytest.raises(OutOfMemoryError, match=f"allocation of {asked} bytes failed"):
        measure_latency(llama, SPEC, use_candidate=lambda: None, use_baseline=lambda: None)


def test_other_runtime_errors_pass_through(llama):
    def broken(_module, _inputs):
        raise RuntimeError("a shape is wrong")

    llama.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        measure_latency(llama, SPEC, use_candidate=lambda: None, use_baseline=lambda: None)


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
