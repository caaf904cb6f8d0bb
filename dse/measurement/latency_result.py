"""What a paired latency measurement found, and how it was taken: values only."""

from __future__ import annotations

from dataclasses import dataclass

from dse.measurement.distribution import Distribution
from dse.measurement.spec import LatencySpec

__all__ = ["PairedLatency", "PhaseLatency"]


@dataclass(frozen=True)
class PhaseLatency:
    """One phase (prefill: seconds a prompt; decode: seconds a token) of the subject and of the dense model.

    Attributes:
        subject: Timings of the subject.
        dense: Timings of the dense model, taken between them.
        ratio: subject / dense, exp(trimmed mean over the blocks of their log ratio); below 1 the subject is faster.
        ratio_low: Lower end of the 95 % bootstrap interval.
        ratio_high: Upper end.
        blocks: ABBA blocks behind the ratio.
    """

    subject: Distribution
    dense: Distribution
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int


@dataclass(frozen=True)
class PairedLatency:
    """A paired latency measurement and how it was taken.

    Attributes:
        prefill: The whole prompt in one pass, up to the first token (time to first token), seconds a batch.
        decode: Seconds per output token (one step of the whole batch); None for encoders.
        device: Devices of the model, as "cpu" or "cuda:0+cuda:1".
        device_name: The GPU's name, or "" on a CPU.
        clock: Clock source.
        mode: How decode steps were run.
        kernel: What computed them in mode fast (`dse.kernel.kernel_name`); "" in other modes.
        warmup_blocks: Blocks run before and not counted.
        is_warm: Whether the first two counted blocks agreed; False where `max_warmup_blocks` ended the warm-up.
        repeats: Prefills a side that count.
        duration_s: Timed work that counts, in seconds.
        spec: Lengths, batch, mode and seed.
        is_valid: Whether the timings can be trusted.
        reason: Why not; empty when valid.
    """

    prefill: PhaseLatency
    decode: PhaseLatency | None
    device: str
    device_name: str
    clock: str
    mode: str
    kernel: str
    warmup_blocks: int
    is_warm: bool
    repeats: int
    duration_s: float
    spec: LatencySpec
    is_valid: bool
    reason: str
