"""Energy of prefill and decode, measured in windows of repeated work; gross and net of idle power, with its spread."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from scipy import stats
from torch import nn

from dse.errors import ConfigError, InvalidMeasurementError
from dse.measurement.idle_power import IdlePower
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.meter import DeviceCondition, EnergyMeter
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

__all__ = [
    "EnergyResult",
    "EnergySpread",
    "PhaseEnergy",
    "WindowEnergy",
    "WindowTaker",
    "measure_energy",
    "min_updates_for",
    "units_of",
]

_BUSY_FACTOR = 1.25
"""A device that draws more than this many times its idle power is at work; idle power varies with temperature."""


@dataclass(frozen=True)
class EnergySpread:
    """Joules per unit (prompt or token), over the windows.

    Attributes:
        mean_j: Total joules divided by the total number of units.
        low_j: Lower end of the 95 % interval (Student's t over the windows); None with one window.
        high_j: Upper end of the 95 % interval.
        deviation_j: Standard deviation over the windows; None with one window.
    """

    mean_j: float
    low_j: float | None
    high_j: float | None
    deviation_j: float | None

    @classmethod
    def of(cls, windows: list[tuple[float, int]]) -> EnergySpread:
        """Summarise the (joules, units) of at least one window."""
        mean_j = sum(joules for joules, _ in windows) / sum(units for _, units in windows)
        if len(windows) < 2:
            return cls(mean_j, None, None, None)
        deviation_j = statistics.stdev(joules / units for joules, units in windows)
        reach_j = float(stats.t.ppf(0.975, len(windows) - 1)) * deviation_j / math.sqrt(len(windows))
        return cls(mean_j, mean_j - reach_j, mean_j + reach_j, deviation_j)


@dataclass(frozen=True)
class WindowEnergy:
    """One window of repeated work.

    Attributes:
        gross_j: Joules of the whole window, idle power included; None if invalid.
        net_j: Joules net of the idle power over the window's length; None if invalid or if idle power is unknown.
        per_device_j: Gross joules of each device; empty if invalid.
        repeats: Batches run in the window.
        updates: Refreshes of the meter inside the window, a lower bound.
        fault: Type of the error that made it invalid, such as "DeviceLostError"; empty if valid.
        reason: Why it is invalid; empty if valid.
    """

    gross_j: float | None
    net_j: float | None
    per_device_j: Mapping[str, float]
    duration_s: float
    repeats: int
    updates: int
    fault: str
    reason: str


@dataclass(frozen=True)
class PhaseEnergy:
    """Energy of one phase.

    Attributes:
        windows: The windows in order.
        units: Units of one batch: sequences and prompt tokens of a prefill, sequences and new tokens of a decode.
        conditions_before: Condition of the devices before the first window.
        conditions_after: Condition of the devices right after the last window, before they cool down.
        per_sequence: Gross joules per sequence of the batch; None if invalid.
        per_token: Gross joules per token; None if invalid.
        net_per_token: Joules per token net of idle power; None if invalid or if idle power is unknown.
        is_valid: Whether the energy is valid.
        reason: Why it is invalid; empty if valid.
    """

    windows: tuple[WindowEnergy, ...]
    units: Mapping[str, int]
    conditions_before: tuple[DeviceCondition, ...]
    conditions_after: tuple[DeviceCondition, ...]
    per_sequence: EnergySpread | None = field(init=False)
    per_token: EnergySpread | None = field(init=False)
    net_per_token: EnergySpread | None = field(init=False)
    is_valid: bool = field(init=False)
    reason: str = field(init=False)

    def __post_init__(self) -> None:
        problems = [window.reason for window in self.windows if window.reason]
        problems += [p for c in (*self.conditions_before, *self.conditions_after) for p in c.problems]
        derived = {
            "per_sequence": self._spread("gross_j", self.units["sequences"]),
            "per_token": self._spread("gross_j", self.units["tokens"]),
            "net_per_token": self._spread("net_j", self.units["tokens"]),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, None if problems else value)
        object.__setattr__(self, "is_valid", not problems)
        object.__setattr__(self, "reason", "; ".join(dict.fromkeys(problems)))

    @property
    def gross_j(self) -> float | None:
        """Gross joules of all windows; None if invalid."""
        return sum(window.gross_j or 0.0 for window in self.windows) if self.is_valid else None

    @property
    def duration_s(self) -> float:
        """Total length of all windows."""
        return sum(window.duration_s for window in self.windows)

    @property
    def repeats(self) -> int:
        """Batches run in all windows."""
        return sum(window.repeats for window in self.windows)

    @property
    def updates(self) -> int:
        """Refreshes in the window with the fewest."""
        return min(window.updates for window in self.windows)

    def _spread(self, name: str, units: int) -> EnergySpread | None:
        values = [(getattr(window, name), window.repeats * units) for window in self.windows]
        if any(value is None for value, _ in values):
            return None
        return EnergySpread.of(values)


@dataclass(frozen=True)
class EnergyResult:
    """Energy of prefill and decode, and how it was measured. Reading the energy of an invalid phase raises.

    Attributes:
        prefill: Energy of the whole prompt.
        decode: Energy of the new tokens; None for encoders.
        meter: Kind of meter: "nvml", "rapl" or "replay".
        source: What the meter reads.
        is_replay: Whether a recording was replayed, so that nothing was measured.
        details: Driver version and device names.
        idle: Idle power that net energy excludes; None if it was not measured.
        spec: Lengths and batch size.
    """

    prefill: PhaseEnergy
    decode: PhaseEnergy | None
    meter: str
    source: str
    is_replay: bool
    details: Mapping[str, str]
    idle: IdlePower | None
    spec: LatencySpec

    @property
    def is_valid(self) -> bool:
        """Whether every phase is valid."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it is invalid; empty if valid."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        return "; ".join(f"{name}: {phase.reason}" for name, phase in phases.items() if phase and not phase.is_valid)

    @property
    def prefill_energy_j(self) -> float:
        """Gross joules per prompt (one sequence of the batch).

        Raises:
            InvalidMeasurementError: A window is invalid; the message gives the reason.
        """
        return _known("prefill", self.prefill, self.prefill.per_sequence).mean_j

    @property
    def energy_per_token_j(self) -> float | None:
        """Gross joules per decoded token of one sequence; None for encoders.

        Raises:
            InvalidMeasurementError: A window is invalid; the message gives the reason.
        """
        return None if self.decode is None else _known("decode", self.decode, self.decode.per_token).mean_j


def measure_energy(
    model: nn.Module,
    spec: LatencySpec,
    meter: EnergyMeter,
    *,
    idle: IdlePower | None = None,
    windows: int = 3,
    precision: float | None = None,
    min_window_s: float = 0.5,
    max_window_s: float = 60.0,
) -> EnergyResult:
    """Measure the energy of prefill and of decode, each in windows that repeat the work until the meter is precise.

    A window ends when it lasts `min_window_s` and the meter has refreshed often enough, or after `max_window_s`. A
    window that is too short, or during which the meter failed, is invalid and gives the reason.

    Args:
        model: Resident Hugging Face model in eval mode, on the devices of `meter`.
        spec: Lengths, batch size, mode and seed; its blocks are not used.
        meter: An open meter.
        idle: Idle power, for net energy.
        windows: Number of windows per phase.
        precision: Maximum relative error of a window. One refresh more or less is an error of 1 / refreshes; by default
            the window spans `meter.min_updates` refreshes.
        min_window_s: Minimum length of a window in seconds.
        max_window_s: Time limit of a window in seconds; a repeat that has started is finished.

    Raises:
        ConfigError: The prompt exceeds the model's context, or a number is out of range.
        OutOfMemoryError: The device has too little memory.
    """
    min_updates = min_updates_for(meter, windows, precision)
    with out_of_memory_errors("measuring energy"):
        workload = Workload(model, spec)
        generation = workload.begin()
        workload.prefill(generation)  # also warms up
        taker = WindowTaker(meter, workload, idle, min_updates, min_window_s, max_window_s)

        def phase(name: str, work: Callable[[], object]) -> PhaseEnergy:
            before, taken, after = taker.take([work] * windows)
            return PhaseEnergy(tuple(taken), units_of(spec, name), before, after)

        prefill = phase("prefill", lambda: workload.prefill(workload.begin()))
        decode = None
        if workload.decodes:
            workload.prefill(generation)
            workload.prepare(generation)
            workload.decode_again(generation)
            decode = phase("decode", lambda: workload.decode_again(generation))
    return EnergyResult(prefill, decode, meter.name, meter.source, meter.is_replay, dict(meter.details), idle, spec)


def min_updates_for(meter: EnergyMeter, windows: int, precision: float | None) -> int:
    """Refreshes that a window must span; checks the numbers.

    Raises:
        ConfigError: A number is out of range.
    """
    if windows < 1 or (precision is not None and not 0 < precision < 1):
        raise ConfigError(f"`windows >= 1` and `0 < precision < 1` must hold, but got {windows} and {precision}")
    return meter.min_updates if precision is None else math.ceil(1 / precision)


def units_of(spec: LatencySpec, phase: str) -> Mapping[str, int]:
    """Units of one batch: its sequences, and the tokens that `phase` computes."""
    tokens = spec.prompt_tokens if phase == "prefill" else spec.new_tokens
    return {"sequences": spec.batch_size, "tokens": spec.batch_size * tokens}


@dataclass(frozen=True)
class WindowTaker:
    """Takes windows of repeated work, each until the meter is precise."""

    meter: EnergyMeter
    workload: Workload
    idle: IdlePower | None
    min_updates: int
    min_window_s: float
    max_window_s: float

    def take(
        self, works: Iterable[Callable[[], object]]
    ) -> tuple[tuple[DeviceCondition, ...], list[WindowEnergy], tuple[DeviceCondition, ...]]:
        """One window of each work in turn, until one has a fault, which would recur.

        Returns:
            The devices' conditions before the first window, the windows, and the conditions after the last one.
        """
        before = self.meter.conditions()
        disturbed = "; ".join(found for condition in before if (found := _unknown_use(condition, self.idle)))
        taken: list[WindowEnergy] = []
        after: tuple[DeviceCondition, ...] = ()
        for work in works:
            window, after = self._window(work)
            window = dataclasses.replace(window, reason=window.reason or disturbed)
            taken.append(window)
            if window.fault:
                break
        return before, taken, after

    def _window(self, work: Callable[[], object]) -> tuple[WindowEnergy, tuple[DeviceCondition, ...]]:
        repeats = 0
        with self.meter.window(self.min_updates) as window:
            while True:
                work()
                self.workload.synchronize()
                repeats += 1
                elapsed_s = window.elapsed_s
                is_long_enough = elapsed_s >= self.min_window_s and window.updates >= self.min_updates
                if is_long_enough or window.is_faulty or elapsed_s >= self.max_window_s:
                    break
        conditions = self.meter.conditions(window.duration_s)
        problem = window.problem
        per_device_j = window.per_device_j if problem is None else {}
        gross_j = sum(per_device_j.values()) if problem is None else None
        idle_w = None if self.idle is None else self.idle.power_w
        net_j = None if gross_j is None or idle_w is None else gross_j - idle_w * window.duration_s
        fault = "" if problem is None else type(problem).__name__
        reason = str(problem or "") or "; ".join(found for condition in conditions for found in condition.problems)
        taken = WindowEnergy(gross_j, net_j, per_device_j, window.duration_s, repeats, window.updates, fault, reason)
        return taken, conditions


def _unknown_use(condition: DeviceCondition, idle: IdlePower | None) -> str:
    """Why it cannot be excluded that others use the device; "" if it can, by its power before the window.

    A device that tells neither who uses it nor how much is compared with its idle power.
    """
    if condition.use_is_known or not condition.other_contexts:
        return ""
    others = ", ".join(map(str, condition.other_contexts))
    idle_w = None if idle is None else idle.per_device_w.get(condition.device)
    if idle_w is None or condition.power_w is None:
        return f"{condition.device} does not tell whether other processes ({others}) use it; end them"
    if condition.power_w > _BUSY_FACTOR * idle_w:
        return (
            f"{condition.device} drew {condition.power_w:.3g} W before the window and {idle_w:.3g} W when idle, so"
            f" other processes ({others}) used it"
        )
    return ""


def _known(name: str, phase: PhaseEnergy, spread: EnergySpread | None) -> EnergySpread:
    if spread is None:
        raise InvalidMeasurementError(f"the energy of {name} must be valid, but {phase.reason}")
    return spread
