"""Latency of a candidate paired with the dense baseline, so that their ratio holds on a noisy machine."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dse.errors import InvalidMeasurementError
from dse.measurement.alternation import TURN_PREFILLS, Alternation, Block, ModelSwap, Turn
from dse.measurement.clock import Stopwatch, stopwatch_for
from dse.measurement.execution import VARIANTS
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.timing_statistics import Distribution, block_ratio
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

__all__ = ["PairedLatency", "PhaseLatency", "measure_latency"]

MAX_INTERVAL_FACTOR = 100.0
"""A ratio whose interval spans more than this factor is kept, but marked invalid. Narrower ones speak for themselves:
timings of milliseconds on a busy machine occasionally reach a factor of ten."""


@dataclass(frozen=True)
class PhaseLatency:
    """Latency of one phase (prefill: seconds per prompt; decode: seconds per token) of candidate and baseline.

    Attributes:
        candidate: Timings of the candidate.
        baseline: Timings of the dense model, taken alternately.
        ratio: candidate / baseline, exp(trimmed mean of the blocks' log ratios); below 1 the candidate is faster.
        ratio_low: Lower end of the 95 % bootstrap interval.
        ratio_high: Upper end of the 95 % bootstrap interval.
        blocks: ABBA blocks that the ratio is computed from.
    """

    candidate: Distribution
    baseline: Distribution
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int


@dataclass(frozen=True)
class PairedLatency:
    """A paired latency measurement and how it was taken.

    Attributes:
        prefill: The whole prompt in one pass up to the first token (time to first token), seconds per batch.
        decode: Seconds per output token (one step of the whole batch); None for encoders.
        device: Devices of the model, such as "cpu" or "cuda:0+cuda:1".
        device_name: Name of the GPU; "" on a CPU.
        clock: Clock source.
        mode: Execution mode of decode steps.
        warmup_blocks: Blocks run first and not counted.
        is_warm: Whether the first two counted blocks agree; False if `max_warmup_blocks` ended the warm-up.
        repeats: Counted prefills of each variant.
        duration_s: Counted timed work in seconds.
        spec: Lengths, batch size, mode and seed.
        is_valid: Whether the timings are valid.
        reason: Why they are invalid; empty if valid.
    """

    prefill: PhaseLatency
    decode: PhaseLatency | None
    device: str
    device_name: str
    clock: str
    mode: str
    warmup_blocks: int
    is_warm: bool
    repeats: int
    duration_s: float
    spec: LatencySpec
    is_valid: bool
    reason: str


def measure_latency(
    model: nn.Module,
    spec: LatencySpec,
    swap: ModelSwap,
    *,
    progress: Callable[[int, int], None] | None = None,
    stopwatch: Stopwatch | None = None,
    workload: Workload | None = None,
) -> PairedLatency:
    """Time prefill and decode of candidate and baseline in ABBA blocks; each sample is part of a real generation.

    Leading blocks are discarded until two successive ones agree; those two count. Blocks are added until there are
    `spec.blocks`, `spec.min_duration_s` of timed work, and `spec.precision`, or until `spec.max_duration_s`.

    Weights are swapped outside the clock. Each method of `swap` is called only when the variant changes, so it need
    not be idempotent. The candidate goes in first and is in place on return; after an error either one may be.

    Args:
        model: The resident Hugging Face model in eval mode.
        spec: Lengths, batch size, mode, blocks, precision and seed.
        swap: Swaps candidate and baseline in `model`.
        progress: Called after every generation with (generations done, generations expected so far), warm-up included.
        stopwatch: Times one call; the best clock of the model's devices by default.
        workload: An existing workload of this model and spec, with its compiled programs; a new one by default.

    Raises:
        ConfigError: The prompt exceeds the model's context, or the mode is not available.
        OutOfMemoryError: The device has too little memory.
        InvalidMeasurementError: The clock did not advance.
    """
    with out_of_memory_errors("measuring latency"):
        swap.use_candidate()  # before anything runs, so that the first pass is the candidate's
        workload = workload or Workload(model, spec)
        clock = stopwatch or stopwatch_for(workload.devices)
        done, expected = itertools.count(1), 4 * (spec.warmup_blocks + spec.blocks)

        def on_generation() -> None:
            number = next(done)
            if progress is not None:
                progress(number, max(number, expected))

        alternation = Alternation(workload, clock, spec.new_tokens, swap, on_generation)
        alternation.assume("candidate")
        blocks, discarded, is_warm = _warm_up(alternation, spec, clock.source)
        while not _is_enough(blocks, spec, decodes=workload.decodes):
            blocks.append(_checked(alternation.block(), clock.source))
        alternation.switch_to("candidate")
    prefill = _phase(blocks, "prefill", spec.seed)
    decode = _phase(blocks, "decode", spec.seed) if workload.decodes else None
    reason = "; ".join(_problems(prefill=prefill, decode=decode))
    return PairedLatency(
        prefill=prefill,
        decode=decode,
        device="+".join(str(device) for device in workload.devices),
        device_name=torch.cuda.get_device_name(first) if (first := workload.devices[0]).type == "cuda" else "",
        clock=clock.source,
        mode=spec.mode,
        warmup_blocks=discarded,
        is_warm=is_warm,
        repeats=2 * TURN_PREFILLS * len(blocks),
        duration_s=sum(block.duration_s for block in blocks),
        spec=spec,
        is_valid=not reason,
        reason=reason,
    )


def _warm_up(alternation: Alternation, spec: LatencySpec, clock: str) -> tuple[list[Block], int, bool]:
    """Run blocks until two successive ones agree; returns those two, the number discarded, and whether they agree."""
    for _ in range(spec.warmup_blocks):
        alternation.block()
    discarded = spec.warmup_blocks
    pair = [_checked(alternation.block(), clock) for _ in range(2)]
    while discarded < spec.max_warmup_blocks and not _agree(*pair, tolerance=spec.warmup_tolerance):
        pair = [pair[1], _checked(alternation.block(), clock)]
        discarded += 1
    return pair, discarded, _agree(*pair, tolerance=spec.warmup_tolerance)


def _agree(first: Block, second: Block, *, tolerance: float) -> bool:
    pairs = [
        (_typical_s(before[variant]), _typical_s(after[variant]))
        for before, after in zip(first.phases.values(), second.phases.values(), strict=True)
        for variant in VARIANTS
        if before[variant]
    ]
    return all(abs(after - before) <= tolerance * before for before, after in pairs)


def _typical_s(turns: Sequence[Turn]) -> float:
    return statistics.median(min(turn) for turn in turns)


def _is_enough(blocks: Sequence[Block], spec: LatencySpec, *, decodes: bool) -> bool:
    if len(blocks) < spec.blocks:
        return False
    duration_s = sum(block.duration_s for block in blocks)
    if duration_s >= spec.max_duration_s:
        return True
    if duration_s < spec.min_duration_s:
        return False
    if spec.precision is None:
        return True
    phases = ("prefill", "decode") if decodes else ("prefill",)
    intervals = (block_ratio(_log_ratios(blocks, phase), seed=spec.seed) for phase in phases)
    return all(interval.half_width <= spec.precision for interval in intervals)


def _log_ratios(blocks: Sequence[Block], phase: str) -> list[float]:
    """One log of candidate / baseline per ABBA block of turns; a generation has one for prefill, several for decode."""
    pairs: list[float] = []
    for turns in (block.phases[phase] for block in blocks):
        pairs += [
            math.log(min(candidate)) - math.log(min(baseline))
            for candidate, baseline in zip(turns["candidate"], turns["baseline"], strict=True)
        ]
    return [(first + second) / 2 for first, second in zip(pairs[::2], pairs[1::2], strict=True)]


def _phase(blocks: Sequence[Block], phase: str, seed: int) -> PhaseLatency:
    ratios = _log_ratios(blocks, phase)
    interval = block_ratio(ratios, seed=seed)
    candidate, baseline = (
        Distribution.of([sample for block in blocks for turn in block.phases[phase][variant] for sample in turn])
        for variant in VARIANTS
    )
    return PhaseLatency(candidate, baseline, interval.ratio, interval.low, interval.high, blocks=len(ratios))


def _checked(block: Block, clock: str) -> Block:
    samples_s = block.samples_s
    bad = sum(1 for sample in samples_s if not (math.isfinite(sample) and sample > 0))
    if bad:
        raise InvalidMeasurementError(
            f"every timing must be positive, but {bad} of {len(samples_s)} timings by {clock} were not; measure again"
        )
    return block


def _problems(**phases: PhaseLatency | None) -> Iterator[str]:
    for name, phase in phases.items():
        if phase is not None and phase.ratio_high > MAX_INTERVAL_FACTOR * phase.ratio_low:
            yield (
                f"the interval of the {name} ratio, {phase.ratio_low:.3g} to {phase.ratio_high:.3g}, spans more than a "
                f"factor of {MAX_INTERVAL_FACTOR:g}: the device was too busy with other work"
            )
