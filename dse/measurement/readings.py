"""Readings of one device over time, converted to the joules between two instants.

A counter lags by up to one update period, so the value it shows at an instant is not the energy at that instant.
`CounterReadings` therefore records when the counter moved and interpolates between these updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dse.measurement.meter_errors import CounterBackwardsError, EnergyWindowError, SamplesTooFarApartError

__all__ = ["EDGE_WAIT_S", "SENSOR_PERIOD_S", "Channel", "CounterReadings", "PowerReadings", "Readings"]

EDGE_WAIT_S = 0.5  # the slowest update period seen in practice is 0.1 s; a slower counter counts as standing still
SENSOR_PERIOD_S = 0.1  # power sensors of GPUs refresh every 0.02 to 0.1 s (Yang et al. 2023, arXiv 2312.02741)
MAX_GAP_S = 0.5  # power sampled less often than this does not describe the work
MAX_POWER_W = 20_000.0  # no device draws this much: a wrap-around that implies more is a counter reset


class Readings(ABC):
    """Readings of one device in time order, and the energy between two instants."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._energies_j: list[float] = []
        self.problem: EnergyWindowError | None = None

    @abstractmethod
    def add(self, time_s: float, value: float) -> None:
        """Add one reading at `time_s` (monotonic seconds)."""

    @abstractmethod
    def updates_between(self, begin_s: float, end_s: float) -> int:
        """Number of times the device refreshed its value between two instants."""

    def energy_between_j(self, begin_s: float, end_s: float) -> float:
        """Joules between two instants, interpolated and clipped to the first and last readings."""
        begin_j, end_j = np.interp([begin_s, end_s], self._times_s, self._energies_j)
        return float(end_j - begin_j)

    def has_update_after(self, time_s: float) -> bool:
        """Whether a refresh was seen after `time_s`."""
        return len(self._times_s) > 1 and self._times_s[-1] > time_s


class CounterReadings(Readings):
    """Readings of a joule counter, stored as the instants at which it moved.

    Args:
        range_j: Joules at which the counter wraps around to zero; None for a counter that never wraps.
    """

    def __init__(self, range_j: float | None = None) -> None:
        super().__init__()
        self._range_j = range_j
        self._last_j = 0.0
        self._last_s = 0.0  # time of the last poll, whether or not the counter moved
        self._moved_last_time = False

    def add(self, time_s: float, value: float) -> None:
        """Add a counter value in joules. A backward step that no wrap-around explains is stored in `problem`."""
        if self.problem:
            return
        moved_j = value - self._last_j
        if not self._times_s:
            self._append(time_s, 0.0)
        elif moved_j != 0:
            if moved_j < 0 and self._range_j is not None:
                moved_j += self._range_j
                if moved_j > MAX_POWER_W * (time_s - self._last_s):
                    moved_j = -1.0
            if moved_j < 0:
                self.problem = CounterBackwardsError(
                    f"the counter went backwards, from {self._last_j:.6g} J to {value:.6g} J"
                )
                return
            if time_s - self._times_s[-1] > EDGE_WAIT_S:
                # No counter refreshes this rarely: no power was drawn until the previous poll.
                self._append(self._last_s, 0.0)
            # A counter slower than the polls moved somewhere between two of them; a faster one shows a fresh value.
            self._append(time_s if self._moved_last_time else (self._last_s + time_s) / 2, moved_j)
        self._moved_last_time = moved_j != 0
        self._last_j, self._last_s = value, time_s

    def _append(self, time_s: float, moved_j: float) -> None:
        self._times_s.append(time_s)
        self._energies_j.append(moved_j + (self._energies_j[-1] if self._energies_j else 0.0))

    def updates_between(self, begin_s: float, end_s: float) -> int:
        """See `Readings.updates_between`. A lower bound: updates between two polls count once."""
        # The first entry marks the start of polling and is not an update.
        return bisect_right(self._times_s, end_s, lo=1) - bisect_right(self._times_s, begin_s, lo=1)


class PowerReadings(Readings):
    """Samples of power, integrated by the trapezoidal rule.

    Args:
        period_s: Seconds between two refreshes of the sensor.
    """

    def __init__(self, period_s: float = SENSOR_PERIOD_S) -> None:
        super().__init__()
        self._period_s = period_s
        self._last_w = 0.0

    def add(self, time_s: float, value: float) -> None:
        """Add a power sample in watts. Samples too far apart are reported in `problem`."""
        gap_s = time_s - self._times_s[-1] if self._times_s else 0.0
        before_j = self._energies_j[-1] if self._energies_j else 0.0
        if gap_s > MAX_GAP_S:
            self.problem = SamplesTooFarApartError(
                f"power samples must be at most {MAX_GAP_S} s apart, but two are {gap_s:.2f} s apart"
            )
        self._times_s.append(time_s)
        self._energies_j.append(before_j + gap_s * (self._last_w + value) / 2)
        self._last_w = value

    def updates_between(self, begin_s: float, end_s: float) -> int:
        """See `Readings.updates_between`. Derived from the sensor's period, since steady power shows no changes."""
        return int((end_s - begin_s) / self._period_s)


@dataclass(frozen=True)
class Channel:
    """One device that a meter reads.

    Attributes:
        device: Its name in records, unique within the meter.
        read: Returns the current joules of a counter, or watts; raises `EnergyWindowError` if it cannot.
        new_readings: Creates an empty `Readings` of the matching kind.
    """

    device: str
    read: Callable[[], float]
    new_readings: Callable[[], Readings]
