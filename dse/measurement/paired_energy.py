"""Energy of candidate and baseline in alternating windows, and its ratio.

The power of a device rises with its temperature, and clocks and voltages drift, so joules that were measured minutes
apart do not compare. Two windows in direct succession do. Their order alternates (ABBA), as that of latencies, so that
steady drift cancels.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats
from torch import nn

from dse.measurement.alternation import ModelSwap
from dse.measurement.energy import EnergyResult, PhaseEnergy, WindowEnergy, WindowTaker, min_updates_for, units_of
from dse.measurement.execution import VARIANTS, Generation, Variant
from dse.measurement.idle_power import IdlePower
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.meter import EnergyMeter
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

__all__ = ["EnergyRatio", "PairedEnergy", "measure_paired_energy", "paired_ratio"]


@dataclass(frozen=True)
class EnergyRatio:
    """Joules of the candidate over those of the baseline; below 1 the candidate needs less.

    Attributes:
        ratio: Geometric mean over the pairs of windows.
        low: Lower end of the 95 % interval (Student's t over the pairs, their order taken out); None with two pairs.
        high: Upper end of the 95 % interval.
        pairs: Pairs of windows.
    """

    ratio: float
    low: float | None
    high: float | None
    pairs: int


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> EnergyRatio | None:
    """The ratio of (candidate, baseline) joules per unit, whose order alternates from pair to pair.

    The log ratios are a mean plus an effect of the order, which drift causes: with an even number of pairs it cancels
    in the mean, and it is taken out of the residuals, which leaves pairs - 2 degrees of freedom.

    Returns:
        The ratio; None if a value is not positive, such as a net energy within the noise of the meter.
    """
    if not pairs or any(value <= 0 for pair in pairs for value in pair):
        return None
    logs = [math.log(candidate / baseline) for candidate, baseline in pairs]
    mean, count = statistics.fmean(logs), len(logs)
    if count < 3:
        return EnergyRatio(math.exp(mean), None, None, count)
    signs = [1 if index % 2 == 0 else -1 for index in range(count)]
    order = sum(sign * log for sign, log in zip(signs, logs, strict=True)) / count
    squares = sum((log - mean - sign * order) ** 2 for sign, log in zip(signs, logs, strict=True))
    reach = float(stats.t.ppf(0.975, count - 2)) * math.sqrt(squares / (count - 2) / count)
    return EnergyRatio(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), count)


@dataclass(frozen=True)
class PairedEnergy:
    """Energy of candidate and baseline from alternating windows.

    Attributes:
        candidate: The candidate's absolute energy.
        baseline: The baseline's, from the windows in between.
        prefill_ratio: Ratio of gross joules; None if a window is invalid.
        decode_ratio: The same for decode; None for encoders too.
        prefill_net_ratio: Ratio of joules net of idle power; None if idle power is unknown or hides the work.
        decode_net_ratio: The same for decode.
    """

    candidate: EnergyResult
    baseline: EnergyResult
    prefill_ratio: EnergyRatio | None = field(init=False)
    decode_ratio: EnergyRatio | None = field(init=False)
    prefill_net_ratio: EnergyRatio | None = field(init=False)
    decode_net_ratio: EnergyRatio | None = field(init=False)

    def __post_init__(self) -> None:
        for phase in ("prefill", "decode"):
            sides = [getattr(result, phase) for result in (self.candidate, self.baseline)]
            for name, key in ((f"{phase}_ratio", "gross_j"), (f"{phase}_net_ratio", "net_j")):
                object.__setattr__(self, name, _ratio_of_phases(*sides, key=key))

    @property
    def is_valid(self) -> bool:
        """Whether every window of both sides is valid."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it is invalid; empty if valid."""
        sides = {"": self.candidate.reason, "baseline: ": self.baseline.reason}
        if sides[""]:
            return sides[""]
        return "".join(f"{name}{reason}" for name, reason in sides.items() if reason)


def measure_paired_energy(
    model: nn.Module,
    spec: LatencySpec,
    meter: EnergyMeter,
    swap: ModelSwap,
    *,
    idle: IdlePower | None = None,
    windows: int = 4,
    precision: float | None = None,
    min_window_s: float = 0.5,
    max_window_s: float = 60.0,
) -> PairedEnergy:
    """Measure the energy of prefill and of decode of both sides in alternating windows; see `measure_energy`.

    The candidate is in place on return; after an error either one may be.

    Args:
        model: Resident Hugging Face model in eval mode, on the devices of `meter`.
        spec: Lengths, batch size, mode and seed; its blocks are not used.
        meter: An open meter.
        swap: Swaps candidate and baseline in `model`.
        idle: Idle power, for net energy.
        windows: Windows of each side per phase; one more if the number is odd, so that drift cancels.
        precision: Maximum relative error of a window.
        min_window_s: Minimum length of a window in seconds.
        max_window_s: Time limit of a window in seconds; a repeat that has started is finished.

    Raises:
        ConfigError: The prompt exceeds the model's context, the mode is not available, or a number is out of range.
        OutOfMemoryError: The device has too little memory.
    """
    min_updates = min_updates_for(meter, windows, precision)
    pairs = windows + windows % 2
    with out_of_memory_errors("measuring energy"):
        swap.use_candidate()
        workload = Workload(model, spec)
        taker = WindowTaker(meter, workload, idle, min_updates, min_window_s, max_window_s)
        sides = _Sides(workload, swap, taker, spec)
        prefill = sides.phase("prefill", pairs, sides.prefill)
        decode: Mapping[Variant, PhaseEnergy | None] = {"candidate": None, "baseline": None}
        if workload.decodes:
            sides.prepare_decode()
            decode = sides.phase("decode", pairs, sides.decode)
        swap.use_candidate()
    found = {
        variant: EnergyResult(
            prefill[variant],
            decode[variant],
            meter.name,
            meter.source,
            meter.is_replay,
            dict(meter.details),
            idle,
            spec,
        )
        for variant in VARIANTS
    }
    return PairedEnergy(found["candidate"], found["baseline"])


class _Sides:
    """Runs the work of one side or the other on the one resident model."""

    def __init__(self, workload: Workload, swap: ModelSwap, taker: WindowTaker, spec: LatencySpec) -> None:
        self._workload, self._swap, self._taker, self._spec = workload, swap, taker, spec
        self._generations: dict[Variant, Generation] = {}

    def switch_to(self, variant: Variant) -> None:
        (self._swap.use_candidate if variant == "candidate" else self._swap.use_baseline)()

    def prefill(self, variant: Variant) -> None:
        self._workload.prefill(self._workload.begin(variant))

    def prepare_decode(self) -> None:
        """Fill a cache for each side, and compile or capture its program, outside the windows."""
        for variant in VARIANTS:
            self.switch_to(variant)
            generation = self._workload.begin(variant)
            self._workload.prefill(generation)
            self._workload.prepare(generation, variant)
            self._workload.decode_again(generation, variant)
            self._generations[variant] = generation

    def decode(self, variant: Variant) -> None:
        self._workload.decode_again(self._generations[variant], variant)

    def phase(self, name: str, pairs: int, work: Callable[[Variant], None]) -> dict[Variant, PhaseEnergy]:
        """Windows in the order candidate, baseline, baseline, candidate; each swap and warm-up is outside of them."""
        order: list[Variant] = [
            variant for index in range(pairs) for variant in VARIANTS[:: 1 if index % 2 == 0 else -1]
        ]

        def ready() -> Iterator[Callable[[], None]]:
            for variant in order:
                self.switch_to(variant)
                work(variant)
                yield functools.partial(work, variant)

        before, taken, after = self._taker.take(ready())
        units = units_of(self._spec, name)
        found: dict[Variant, PhaseEnergy] = {}
        for variant in VARIANTS:
            own = [window for window, owner in zip(taken, order, strict=False) if owner == variant]
            # A fault in the first window leaves the other side without one; it is no more valid than this side.
            found[variant] = PhaseEnergy(tuple(own or taken[-1:]), units, before, after)
        return found


def _ratio_of_phases(candidate: PhaseEnergy | None, baseline: PhaseEnergy | None, *, key: str) -> EnergyRatio | None:
    if candidate is None or baseline is None or not (candidate.is_valid and baseline.is_valid):
        return None

    def per_repeat(window: WindowEnergy) -> float:
        return float(getattr(window, key) or 0.0) / window.repeats

    return paired_ratio(
        [(per_repeat(one), per_repeat(other)) for one, other in zip(candidate.windows, baseline.windows, strict=True)]
    )
