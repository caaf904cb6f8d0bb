"""Readings of one device over time, and the joules between two instants.

A counter is stale by up to one update period, so its value at an instant is not what it shows then. Its track therefore
keeps the instants at which it moved, and interpolates between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dse.measurement.faults import CounterBackwardsError, SamplesTooFarApartError, WindowFault

__all__ = ["EDGE_WAIT_S", "SENSOR_PERIOD_S", "Channel", "CounterTrack", "PowerTrack", "Track"]

EDGE_WAIT_S = 0.5  # slowest update period met in practice is 0.1 s; a counter that sleeps longer is taken as it is
SENSOR_PERIOD_S = 0.1  # power sensors of GPUs refresh every 0.02 to 0.1 s (Yang et al. 2023, arXiv 2312.02741)
MAX_GAP_S = 0.5  # power read more seldom than this is not a measurement of the work
MAX_POWER_W = 20_000.0  # no device draws this: a wrapped counter that implies more was reset, not wrapped


class Track(ABC):
    """Readings of one device, in time order, and the energy between two instants."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._energies_j: list[float] = []
        self.problem: WindowFault | None = None

    @abstractmethod
    def add(self, time_s: float, value: float) -> None:
        """Take one reading at `time_s` (monotonic seconds)."""

    @abstractmethod
    def updates_between(self, begin_s: float, end_s: float) -> int:
        """How often the device refreshed its figure between two instants."""

    def energy_between_j(self, begin_s: float, end_s: float) -> float:
        """Joules between two instants, by interpolation; the first and last readings bound it."""
        begin_j, end_j = np.interp([begin_s, end_s], self._times_s, self._energies_j)
        return float(end_j - begin_j)

    def has_update_after(self, time_s: float) -> bool:
        """Whether a refresh was seen after `time_s`."""
        return len(self._times_s) > 1 and self._times_s[-1] > time_s


class CounterTrack(Track):
    """A counter of joules, kept as the instants at which it moved.

    Args:
        range_j: Joules at which the counter wraps to zero; None for a counter that never does.
    """

    def __init__(self, range_j: float | None = None) -> None:
        super().__init__()
        self._range_j = range_j
        self._last_j = 0.0
        self._last_s = 0.0  # of the last poll, moved or not
        self._moved_last_time = False

    def add(self, time_s: float, value: float) -> None:
        """See `Track.add`; `value` in joules. A backward move that no wrap explains is noted in `problem`."""
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
                # No counter refreshes so seldom: it stood still because no power was drawn, up to the poll before.
                self._append(self._last_s, 0.0)
            # A counter slower than the polls moved somewhere between two of them; a faster one shows a fresh value.
            self._append(time_s if self._moved_last_time else (self._last_s + time_s) / 2, moved_j)
        self._moved_last_time = moved_j != 0
        self._last_j, self._last_s = value, time_s

    def _append(self, time_s: float, moved_j: float) -> None:
        self._times_s.append(time_s)
        self._energies_j.append(moved_j + (self._energies_j[-1] if self._energies_j else 0.0))

    def updates_between(self, begin_s: float, end_s: float) -> int:
        """See `Track.updates_between`; updates between two polls count once, so this is a lower bound."""
        # The first entry is where watching began, not an update.
        return bisect_right(self._times_s, end_s, lo=1) - bisect_right(self._times_s, begin_s, lo=1)


class PowerTrack(Track):
    """Samples of power, integrated by the trapezoid rule.

    Args:
        period_s: Seconds between two refreshes of the sensor.
    """

    def __init__(self, period_s: float = SENSOR_PERIOD_S) -> None:
        super().__init__()
        self._period_s = period_s
        self._last_w = 0.0

    def add(self, time_s: float, value: float) -> None:
        """See `Track.add`; `value` in watts. Samples too far apart are noted in `problem`."""
        gap_s = time_s - self._times_s[-1] if self._times_s else 0.0
        before_j = self._energies_j[-1] if self._energies_j else 0.0
        if gap_s > MAX_GAP_S:
            self.problem = SamplesTooFarApartError(f"power samples lie {gap_s:.2f} s apart, more than {MAX_GAP_S} s")
        self._times_s.append(time_s)
        self._energies_j.append(before_j + gap_s * (self._last_w + value) / 2)
        self._last_w = value

    def updates_between(self, begin_s: float, end_s: float) -> int:
        """See `Track.updates_between`; counted by the sensor's period, since a steady power shows no change."""
        return int((end_s - begin_s) / self._period_s)


@dataclass(frozen=True)
class Channel:
    """One device to read.

    Attributes:
        device: Its name in records, unique within the meter.
        read: Reads it now: joules for a counter, watts for power. Raises InvalidMeasurementError when it cannot.
        new_track: Makes the empty track that suits the readings.
    """

    device: str
    read: Callable[[], float]
    new_track: Callable[[], Track]
