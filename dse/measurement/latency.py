"""Latency of a point beside the dense model, in alternation, so that their ratio holds on a noisy machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from dse.errors import InvalidMeasurementError
from dse.kernel import kernel_name
from dse.measurement.alternation import SIDES, TURN_PREFILLS, Alternation, Block, Side, Turn
from dse.measurement.clock import Stopwatch, stopwatch_for
from dse.measurement.distribution import Distribution, RatioInterval, block_ratio
from dse.measurement.latency_result import PairedLatency, PhaseLatency
from dse.measurement.out_of_memory import out_of_memory_errors
from dse.measurement.spec import LatencySpec
from dse.measurement.workload import Workload

__all__ = ["LatencySpec", "PairedLatency", "PhaseLatency", "measure_latency"]

# An interval wider than this factor says nothing at all; it is kept, but marked invalid. Narrower ones speak for
# themselves: milliseconds timed on a busy machine reach a factor of ten now and then.
MAX_INTERVAL_FACTOR = 100.0


def measure_latency(
    model: nn.Module,
    spec: LatencySpec,
    *,
    use_candidate: Callable[[], None],
    use_baseline: Callable[[], None],
    progress: Callable[[int, int], None] | None = None,
    stopwatch: Stopwatch | None = None,
    workload: Workload | None = None,
) -> PairedLatency:
    """Time prefill and decode of a subject and of the dense model in ABBA blocks, each sample of a real generation.

    Leading blocks are discarded until two successive ones agree; those two count. Blocks are added until there are
    `spec.blocks`, `spec.min_duration_s` of timed work, and `spec.precision`, or until `spec.max_duration_s`.

    The callbacks swap the subject in and out of the one resident `model`, outside the clock. Each is called only when
    the side changes, so they need not be idempotent; the subject is put in first and is in place on return. After an
    error whichever side was in use stays.

    Args:
        model: The resident Hugging Face model, in eval mode.
        spec: Lengths, batch, mode, blocks, precision and seed.
        use_candidate: Puts the subject's weights in place.
        use_baseline: Puts the dense weights back.
        progress: Called after every generation with (generations done, generations expected so far), warm-up included.
        stopwatch: Times one call; the best clock of the model's devices by default.
        workload: Of this model and spec, made before, with what it has compiled; a new one by default.

    Raises:
        ConfigError: The prompt does not fit the model's context, or the model cannot be measured so.
        OutOfMemoryError: The device has no room.
        InvalidMeasurementError: The clock did not move.
    """
    with out_of_memory_errors("measuring latency"):
        use_candidate()  # before anything runs, so that the first pass is the subject's
        swaps: dict[Side, Callable[[], None]] = {"subject": use_candidate, "dense": use_baseline}
        workload = workload or Workload(model, spec)
        clock = stopwatch or stopwatch_for(workload.devices)
        tally = _Tally(spec, progress)
        alternation = Alternation(workload, clock, spec.new_tokens, swaps, tally.count)
        alternation.assume("subject")
        blocks, discarded, is_warm = _warm_up(alternation, spec, clock.source)
        while not _is_enough(blocks, spec, decodes=workload.decodes):
            blocks.append(_checked(alternation.block(), clock.source))
        alternation.switch_to("subject")
    prefill = _phase(blocks, "prefill", spec.seed)
    decode = _phase(blocks, "decode", spec.seed) if workload.decodes else None
    reason = "; ".join(_reasons_against(prefill=prefill, decode=decode))
    return PairedLatency(
        prefill=prefill,
        decode=decode,
        device="+".join(str(device) for device in workload.devices),
        device_name=_device_name(workload.devices[0]),
        clock=clock.source,
        mode=spec.mode,
        kernel=_kernel(model, spec),
        warmup_blocks=discarded,
        is_warm=is_warm,
        repeats=2 * TURN_PREFILLS * len(blocks),
        duration_s=sum(block.duration_s for block in blocks),
        spec=spec,
        is_valid=not reason,
        reason=reason,
    )


class _Tally:
    """Tells of progress: how many generations are done, of how many there will be at least."""

    def __init__(self, spec: LatencySpec, progress: Callable[[int, int], None] | None) -> None:
        self._expected = 4 * (spec.warmup_blocks + spec.blocks)
        self._done = 0
        self._progress = progress

    def count(self) -> None:
        """One more generation is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._done, self._expected))


def _warm_up(alternation: Alternation, spec: LatencySpec, clock: str) -> tuple[list[Block], int, bool]:
    """Run blocks until two successive ones agree; returns those two, how many went before, and whether they agreed."""
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
        (_typical_s(before[side]), _typical_s(after[side]))
        for before, after in zip(first.phases, second.phases, strict=True)
        for side in SIDES
        if before[side]
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
    return all(_interval(blocks, phase, spec.seed).half_width <= spec.precision for phase in phases)


def _log_ratios(blocks: Sequence[Block], phase: str) -> list[float]:
    """One log of subject / dense for each ABBA block of turns: a prefill block has one, a decode block several."""
    pairs: list[float] = []
    for block in blocks:
        turns = block.prefill if phase == "prefill" else block.decode
        pairs += [
            math.log(min(subject)) - math.log(min(dense))
            for subject, dense in zip(turns["subject"], turns["dense"], strict=True)
        ]
    return [(first + second) / 2 for first, second in zip(pairs[::2], pairs[1::2], strict=True)]


def _interval(blocks: Sequence[Block], phase: str, seed: int) -> RatioInterval:
    return block_ratio(_log_ratios(blocks, phase), seed=seed)


def _phase(blocks: Sequence[Block], phase: str, seed: int) -> PhaseLatency:
    ratios = _log_ratios(blocks, phase)
    interval = block_ratio(ratios, seed=seed)
    spread: dict[Side, Distribution] = {}
    for side in SIDES:
        turns = [turn for block in blocks for turn in (block.prefill if phase == "prefill" else block.decode)[side]]
        spread[side] = Distribution.of([sample for turn in turns for sample in turn])
    return PhaseLatency(
        spread["subject"], spread["dense"], interval.ratio, interval.low, interval.high, blocks=len(ratios)
    )


def _checked(block: Block, clock: str) -> Block:
    samples_s = block.samples_s
    bad = sum(1 for sample in samples_s if not (math.isfinite(sample) and sample > 0))
    if bad:
        raise InvalidMeasurementError(
            f"every timing must be positive, but {bad} of {len(samples_s)} timings by {clock} were not; measure again"
        )
    return block


def _reasons_against(**phases: PhaseLatency | None) -> Iterator[str]:
    for name, phase in phases.items():
        if phase is not None and phase.ratio_high > MAX_INTERVAL_FACTOR * phase.ratio_low:
            yield (
                f"the interval of the {name} ratio, {phase.ratio_low:.3g} to {phase.ratio_high:.3g}, spans more than a "
                f"factor of {MAX_INTERVAL_FACTOR:g}: the device was too busy with other work"
            )


def _kernel(model: nn.Module, spec: LatencySpec) -> str:
    first = next(model.parameters())
    return kernel_name(first.device, first.dtype) if spec.mode == "fast" else ""


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
