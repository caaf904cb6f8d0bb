"""Serve the same requests with candidate and baseline in turn, and compare TTFT, TPOT, throughput and energy."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dse.engines.engine import EngineWork
from dse.engines.server import Server
from dse.engines.turns import Turn, TurnTaker
from dse.errors import InvalidMeasurementError
from dse.measurement import latency as latency_limits
from dse.measurement.energy import EnergySpread
from dse.measurement.idle_power import IdlePower
from dse.measurement.latency import PhaseLatency
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.meter import EnergyMeter
from dse.measurement.timing_statistics import Distribution, RatioInterval, block_ratio

__all__ = ["PairedServing", "ServingEnergy", "measure_serving", "work_of"]

_TIMES = ("ttft_s", "tpot_s", "prefill_s", "window_s")


@dataclass(frozen=True)
class ServingEnergy:
    """Energy of the same windows that were timed, gross of idle power.

    Attributes:
        candidate_request: Joules per request of the candidate.
        baseline_request: Joules per request of the baseline.
        candidate_net_request: Joules per request net of idle power; None if idle power is unknown.
        baseline_net_request: The same of the baseline.
        ratio: candidate / baseline with its 95 % interval; 1 if the candidate is the baseline.
        is_valid: Whether the energy is valid.
        reason: Why it is invalid; empty if valid.
        meter: Kind of meter.
        source: What the meter reads.
        is_replay: Whether a recording was replayed, so that nothing was measured.
    """

    candidate_request: EnergySpread | None
    baseline_request: EnergySpread | None
    candidate_net_request: EnergySpread | None
    baseline_net_request: EnergySpread | None
    ratio: RatioInterval | None
    is_valid: bool
    reason: str
    meter: str
    source: str
    is_replay: bool


@dataclass(frozen=True)
class PairedServing:
    """A paired measurement of an engine that serves requests, and how it was taken.

    Ratios are exp(trimmed mean of the log ratios of the ABBA blocks) with their 95 % bootstrap interval, as for
    latencies. A turn's time is the median over its requests.

    Attributes:
        engine: Name of the engine.
        versions: Package to version.
        work: The requests of one turn.
        ttft: Time to first token, over all requests.
        tpot: Time per output token, over all requests; None if requests generate one token.
        prefill: Seconds until every one of the first `concurrency` requests, submitted together, has its first token.
        window: Seconds from the first submission to the last token of all requests of a turn.
        energy: None without a meter.
        start_up_s: Seconds that the candidate's engine took to start.
        warmup_blocks: Blocks run first and not counted.
        duration_s: Counted timed work in seconds.
        device: The device.
        is_valid: Whether the timings are valid.
        reason: Why they are invalid; empty if valid.
    """

    engine: str
    versions: Mapping[str, str]
    work: EngineWork
    ttft: PhaseLatency
    tpot: PhaseLatency | None
    prefill: PhaseLatency
    window: PhaseLatency
    energy: ServingEnergy | None
    start_up_s: float
    warmup_blocks: int
    duration_s: float
    device: str
    is_valid: bool
    reason: str


def work_of(spec: LatencySpec, requests: int | None = None) -> EngineWork:
    """The requests of one turn: the batch size of `spec` is the concurrency.

    Args:
        spec: Lengths, batch size and seed.
        requests: Number of requests, rounded up to a multiple of the concurrency; None means one for each place.
    """
    rounds = 1 if requests is None else max(1, -(-requests // spec.batch_size))
    return EngineWork(spec.prompt_tokens, spec.new_tokens, spec.batch_size, rounds * spec.batch_size, spec.seed)


def measure_serving(
    baseline: Server,
    candidate: Server | None,
    spec: LatencySpec,
    *,
    requests: int | None = None,
    meter: EnergyMeter | None = None,
    idle: IdlePower | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> PairedServing:
    """Serve the same requests with candidate and baseline in ABBA turns.

    Blocks are added until there are `spec.blocks` of them and `spec.precision` is reached, or until
    `spec.max_duration_s`. With a meter, each turn is an energy window, in which the work repeats until the meter has
    refreshed often enough.

    Args:
        baseline: Serves the dense model.
        candidate: Serves the design point; None measures the baseline alone, with ratios of 1.
        spec: Lengths, concurrency (its batch size), blocks, precision, time limits and seed.
        requests: Requests of one turn; see `work_of`.
        meter: An open energy meter; None measures no energy.
        idle: Idle power, for net energy.
        device: Name of the device, for the record.
        progress: Called with (turns done, turns expected).

    Raises:
        EngineError: An engine failed, died or exceeded its time limit.
        InvalidMeasurementError: The clock did not advance.
        OutOfMemoryError: The device has too little memory.
    """
    work = work_of(spec, requests)
    taker = TurnTaker(work, meter, idle)
    order = (baseline,) * 4 if candidate is None else (candidate, baseline, baseline, candidate)
    for _ in range(max(1, spec.warmup_blocks)):
        for server in dict.fromkeys(order):
            taker.warm_up(server)
    blocks: list[tuple[Turn, ...]] = []
    while not _is_enough(blocks, spec, is_paired=candidate is not None):
        block = []
        for server in order:
            block.append(_checked(taker.turn(server)))
            if progress is not None:
                done = 4 * len(blocks) + len(block)
                progress(done, max(done, 4 * spec.blocks))
        blocks.append(tuple(block))
    is_paired = candidate is not None
    times = {name: _phase(blocks, name, spec.seed, is_paired=is_paired) for name in _TIMES if _samples(blocks, name)}
    served = baseline if candidate is None else candidate
    reason = "; ".join(problem for name, phase in times.items() if (problem := _problem(name, phase)))
    return PairedServing(
        engine=served.engine,
        versions=served.versions,
        work=work,
        ttft=times["ttft_s"],
        tpot=times.get("tpot_s"),
        prefill=times["prefill_s"],
        window=times["window_s"],
        energy=None if meter is None else _energy(blocks, work, meter, taker, spec.seed, is_paired=is_paired),
        start_up_s=served.start_up_s,
        warmup_blocks=max(1, spec.warmup_blocks),
        duration_s=sum(turn.duration_s for block in blocks for turn in block),
        device=device,
        is_valid=not reason,
        reason=reason,
    )


def _is_enough(blocks: Sequence[tuple[Turn, ...]], spec: LatencySpec, *, is_paired: bool) -> bool:
    if len(blocks) < spec.blocks:
        return False
    duration_s = sum(turn.duration_s for block in blocks for turn in block)
    if duration_s >= spec.max_duration_s:
        return True
    if duration_s < spec.min_duration_s:
        return False
    if not is_paired:
        return True
    names = [name for name in _TIMES if _samples(blocks, name)]
    ratios = [block_ratio(_log_ratios(blocks, name), seed=spec.seed) for name in names]
    if any(_is_too_wide(ratio.low, ratio.high) for ratio in ratios):
        return False
    return spec.precision is None or all(ratio.half_width <= spec.precision for ratio in ratios)


def _is_too_wide(low: float, high: float) -> bool:
    return high > latency_limits.MAX_INTERVAL_FACTOR * low


def _log_ratios(blocks: Sequence[tuple[Turn, ...]], name: str) -> list[float]:
    """Log of candidate / baseline of each block (candidate, baseline, baseline, candidate)."""
    found = []
    for block in blocks:
        logs = [math.log(statistics.median(getattr(turn, name))) for turn in block]
        found.append((logs[0] - logs[1] + logs[3] - logs[2]) / 2)
    return found


def _samples(blocks: Sequence[tuple[Turn, ...]], name: str) -> bool:
    return bool(getattr(blocks[0][0], name))


def _phase(blocks: Sequence[tuple[Turn, ...]], name: str, seed: int, *, is_paired: bool) -> PhaseLatency:
    candidate = [sample for block in blocks for turn in (block[0], block[3]) for sample in getattr(turn, name)]
    baseline = [sample for block in blocks for turn in (block[1], block[2]) for sample in getattr(turn, name)]
    if not is_paired:
        whole = Distribution.of(candidate + baseline)
        return PhaseLatency(whole, whole, 1.0, 1.0, 1.0, len(blocks))
    interval = block_ratio(_log_ratios(blocks, name), seed=seed)
    return PhaseLatency(
        Distribution.of(candidate),
        Distribution.of(baseline),
        interval.ratio,
        interval.low,
        interval.high,
        len(blocks),
    )


def _checked(turn: Turn) -> Turn:
    samples_s = [sample for name in _TIMES for sample in getattr(turn, name)]
    bad = sum(1 for sample in samples_s if not (math.isfinite(sample) and sample > 0))
    if bad:
        raise InvalidMeasurementError(
            f"every timing of an engine must be positive, but {bad} of {len(samples_s)} were not; measure again"
        )
    return turn


def _problem(name: str, phase: PhaseLatency) -> str:
    if not _is_too_wide(phase.ratio_low, phase.ratio_high):
        return ""
    return (
        f"the interval of the {name} ratio, {phase.ratio_low:.3g} to {phase.ratio_high:.3g}, spans more than a factor"
        f" of {latency_limits.MAX_INTERVAL_FACTOR:g}: the device was too busy with other work"
    )


def _energy(
    blocks: Sequence[tuple[Turn, ...]],
    work: EngineWork,
    meter: EnergyMeter,
    taker: TurnTaker,
    seed: int,
    *,
    is_paired: bool,
) -> ServingEnergy:
    turns = [turn for block in blocks for turn in block]
    problems = [turn.energy_reason for turn in turns if turn.energy_reason] + list(taker.condition_problems)
    reason = "; ".join(dict.fromkeys(problems))
    empty = ServingEnergy(None, None, None, None, None, not reason, reason, meter.name, meter.source, meter.is_replay)
    if reason:
        return empty
    sides = (
        {"candidate": (0, 3), "baseline": (1, 2)} if is_paired else dict.fromkeys(("candidate", "baseline"), range(4))
    )
    spreads = {
        f"{side}{suffix}_request": _spread([block[i] for block in blocks for i in places], name, work)
        for side, places in sides.items()
        for suffix, name in (("", "energy_j"), ("_net", "net_energy_j"))
    }
    logs = [(_log_j(block[0]) - _log_j(block[1]) + _log_j(block[3]) - _log_j(block[2])) / 2 for block in blocks]
    ratio = block_ratio(logs, seed=seed) if is_paired else RatioInterval(1.0, 1.0, 1.0)
    return dataclasses.replace(empty, ratio=ratio, **spreads)


def _spread(turns: Sequence[Turn], name: str, work: EngineWork) -> EnergySpread | None:
    windows = [(getattr(turn, name), turn.repeats * work.requests) for turn in turns]
    return None if any(joules is None for joules, _ in windows) else EnergySpread.of(windows)


def _log_j(turn: Turn) -> float:
    """Log of the joules of one repeat of the work."""
    assert turn.energy_j is not None  # noqa: S101 - only valid windows come here
    return math.log(max(turn.energy_j, 1e-12) / turn.repeats)
