"""Latency of a point beside the dense model, in alternation, so that their ratio holds on a noisy machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dse.errors import InvalidMeasurementError
from dse.measurement.clock import stopwatch_for
from dse.measurement.distribution import Distribution, paired_ratio
from dse.measurement.out_of_memory import out_of_memory_errors
from dse.measurement.workload import LatencySpec, Workload

__all__ = ["LatencySpec", "PairedLatency", "PhaseLatency", "measure_latency"]

# An interval wider than this factor says nothing at all; it is kept, but marked invalid. Narrower ones speak for
# themselves: milliseconds timed on a busy machine reach a factor of ten now and then.
MAX_INTERVAL_FACTOR = 100.0

# Subject, dense, dense, subject: a drift that is linear within a block falls on both sides alike.
_ORDER = ("subject", "dense", "dense", "subject")


@dataclass(frozen=True)
class PhaseLatency:
    """One phase (prefill: seconds a prompt; decode: seconds a token) of the subject and of the dense model.

    Attributes:
        subject: Timings of the subject.
        dense: Timings of the dense model, taken between them.
        ratio: subject / dense, exp(median of the log ratios of adjacent pairs); below 1 the subject is faster.
        ratio_low: Lower end of the 95 % bootstrap interval.
        ratio_high: Upper end.
    """

    subject: Distribution
    dense: Distribution
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class PairedLatency:
    """A paired latency measurement and how it was taken.

    Attributes:
        prefill: The whole prompt in one pass, up to the first token (time to first token), seconds a batch.
        decode: Seconds per output token (one step of the whole batch); None for encoders.
        device: Devices of the model, as "cpu" or "cuda:0+cuda:1".
        device_name: The GPU's name, or "" on a CPU.
        clock: Clock source.
        warmup_blocks: Blocks run before and not counted.
        repeats: Samples a side.
        spec: Lengths, batch and seed.
        is_valid: Whether the timings can be trusted.
        reason: Why not; empty when valid.
    """

    prefill: PhaseLatency
    decode: PhaseLatency | None
    device: str
    device_name: str
    clock: str
    warmup_blocks: int
    repeats: int
    spec: LatencySpec
    is_valid: bool
    reason: str


def measure_latency(
    model: nn.Module,
    spec: LatencySpec,
    *,
    use_subject: Callable[[], None],
    use_dense: Callable[[], None],
    progress: Callable[[int, int], None] | None = None,
) -> PairedLatency:
    """Time prefill and decode of a subject and of the dense model in ABBA blocks, each sample a real generation.

    The callbacks swap the subject in and out of the one resident `model`, outside the clock. Each is called only when
    the side changes, so they need not be idempotent; the subject is put in first and is in place on return. After an
    error whichever side was in use stays.

    Args:
        model: The resident Hugging Face model, in eval mode.
        spec: Lengths, batch, blocks and seed.
        use_subject: Puts the subject's weights in place.
        use_dense: Puts the dense weights back.
        progress: Called after every sample with (samples done, samples in all), warm-up included.

    Raises:
        ConfigError: The prompt does not fit the model's context, or the model cannot be measured so.
        OutOfMemoryError: The device has no room.
        InvalidMeasurementError: The clock did not move.
    """
    use_subject()
    in_use = "subject"
    swap = {"subject": use_subject, "dense": use_dense}
    prefill_s: dict[str, list[float]] = {"subject": [], "dense": []}
    decode_s: dict[str, list[float]] = {"subject": [], "dense": []}
    total = (spec.warmup_blocks + spec.blocks) * len(_ORDER)
    with out_of_memory_errors("measuring latency"):
        workload = Workload(model, spec)
        stopwatch = stopwatch_for(workload.devices)
        for index in range(total):
            side = _ORDER[index % len(_ORDER)]
            if side != in_use:
                swap[side]()
                in_use = side
                workload.settle()
            state, prefill_sample_s = stopwatch.time(workload.prefill)
            decode_sample_s = None
            if workload.decodes:
                _, whole_s = stopwatch.time(lambda state=state: workload.decode(state))  # type: ignore[misc]
                decode_sample_s = whole_s / spec.new_tokens
            if index >= spec.warmup_blocks * len(_ORDER):
                prefill_s[side].append(prefill_sample_s)
                if decode_sample_s is not None:
                    decode_s[side].append(decode_sample_s)
            if progress is not None:
                progress(index + 1, total)
    samples = [*prefill_s["subject"], *prefill_s["dense"], *decode_s["subject"], *decode_s["dense"]]
    _refuse_stopped_clock(samples, stopwatch.source)
    prefill = _phase(prefill_s, spec.seed)
    decode = _phase(decode_s, spec.seed) if workload.decodes else None
    reason = "; ".join(_reasons_against(prefill=prefill, decode=decode))
    return PairedLatency(
        prefill=prefill,
        decode=decode,
        device="+".join(str(device) for device in workload.devices),
        device_name=_device_name(workload.devices[0]),
        clock=stopwatch.source,
        warmup_blocks=spec.warmup_blocks,
        repeats=2 * spec.blocks,
        spec=spec,
        is_valid=not reason,
        reason=reason,
    )


def _phase(samples_s: dict[str, list[float]], seed: int) -> PhaseLatency:
    """Summarise one phase. The k-th subject and the k-th dense sample were neighbours in time: AB, then BA."""
    subject, dense = samples_s["subject"], samples_s["dense"]
    interval = paired_ratio(subject, dense, seed=seed)
    return PhaseLatency(Distribution.of(subject), Distribution.of(dense), interval.ratio, interval.low, interval.high)


def _refuse_stopped_clock(samples_s: list[float], clock: str) -> None:
    bad = sum(1 for sample in samples_s if not (math.isfinite(sample) and sample > 0))
    if bad:
        raise InvalidMeasurementError(
            f"every timing must be positive, but {bad} of {len(samples_s)} timings by {clock} were not; measure again"
        )


def _reasons_against(**phases: PhaseLatency | None) -> Iterator[str]:
    for name, phase in phases.items():
        if phase is not None and phase.ratio_high > MAX_INTERVAL_FACTOR * phase.ratio_low:
            yield (
                f"the interval of the {name} ratio, {phase.ratio_low:.3g} to {phase.ratio_high:.3g}, spans more than a "
                f"factor of {MAX_INTERVAL_FACTOR:g}: the device was too busy with other work"
            )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
