"""What every energy meter shares: tracks of readings, the window that turns them into joules, the abstract meter.

A counter is stale by up to one update period, so its value at an instant is not what it shows then. A window therefore
watches the counter from a background thread, begins right after an update, goes on watching until one update after its
end, and interpolates between updates. What is left is the error of the clock at two edges, not of two periods.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

import numpy as np

from dse.errors import InvalidMeasurementError, MeterUnavailableError

__all__ = ["Channel", "CounterTrack", "EnergyMeter", "EnergyWindow", "NoMeterError", "PowerTrack", "Track"]

POLL_S = 0.01  # while work runs: rare enough to cost the work nothing that can be seen
EDGE_POLL_S = 0.001  # while nothing runs but the wait for an update
EDGE_WAIT_S = 0.5  # slowest update period met in practice is 0.1 s; a counter that sleeps longer is taken as it is
SENSOR_PERIOD_S = 0.1  # power sensors of GPUs refresh every 0.02 to 0.1 s (Yang et al. 2023, arXiv 2312.02741)
MAX_GAP_S = 0.5  # power read more seldom than this is not a measurement of the work
MAX_POWER_W = 20_000.0  # no device draws this: a wrapped counter that implies more was reset, not wrapped


class NoMeterError(MeterUnavailableError):
    """A meter cannot be opened; `meter`, `reason` and `remedy` say the parts of the message for a table."""

    def __init__(self, meter: str, reason: str, remedy: str) -> None:
        super().__init__(f"no energy meter {meter}: {reason}; {remedy}")
        self.meter = meter
        self.reason = reason
        self.remedy = remedy


class Track(ABC):
    """Readings of one device, in time order, and the energy between two instants."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._energies_j: list[float] = []
        self.problem = ""

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
                self.problem = f"the counter went backwards, from {self._last_j:.6g} J to {value:.6g} J"
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
    """Samples of power, integrated by the trapezoid rule."""

    def __init__(self) -> None:
        super().__init__()
        self._last_w = 0.0

    def add(self, time_s: float, value: float) -> None:
        """See `Track.add`; `value` in watts. Samples too far apart are noted in `problem`."""
        gap_s = time_s - self._times_s[-1] if self._times_s else 0.0
        before_j = self._energies_j[-1] if self._energies_j else 0.0
        if gap_s > MAX_GAP_S:
            self.problem = f"power samples lie {gap_s:.2f} s apart, more than {MAX_GAP_S} s"
        self._times_s.append(time_s)
        self._energies_j.append(before_j + gap_s * (self._last_w + value) / 2)
        self._last_w = value

    def updates_between(self, begin_s: float, end_s: float) -> int:
        """See `Track.updates_between`; counted by the sensor's period, since a steady power shows no change."""
        return int((end_s - begin_s) / SENSOR_PERIOD_S)


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


class EnergyWindow:
    """Energy of the work between entering and leaving; made by `EnergyMeter.window`.

    After the block `begin_s` and `end_s` hold the window's bounds on `time.perf_counter`.
    """

    def __init__(self, channels: tuple[Channel, ...], min_updates: int, synchronize: Callable[[], None]) -> None:
        self._channels = channels
        self._tracks = {channel.device: channel.new_track() for channel in channels}
        self._min_updates = min_updates
        self._synchronize = synchronize
        self._changed = threading.Condition()
        self._poll_s = EDGE_POLL_S
        self._is_stopped = False
        self._is_closed = False
        self._fault = ""
        self._thread = threading.Thread(target=self._watch, name="dse-energy", daemon=True)
        self.begin_s = 0.0
        self.end_s = 0.0

    def __enter__(self) -> EnergyWindow:
        self._synchronize()
        entered_s = time.perf_counter()
        self._thread.start()
        self._await_update_after(entered_s)
        self._poll_s = POLL_S
        self.begin_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._synchronize()
            self.end_s = time.perf_counter()
            self._poll_s = EDGE_POLL_S
            if error is None:
                self._await_update_after(self.end_s)
            else:
                self._fault = self._fault or f"the work was interrupted by {type(error).__name__}"
        finally:
            with self._changed:
                self._is_stopped = True
                self._changed.notify_all()
            self._thread.join()
            self._is_closed = True

    @property
    def elapsed_s(self) -> float:
        """Seconds since the window began, while it is open."""
        return time.perf_counter() - self.begin_s

    @property
    def updates(self) -> int:
        """Refreshes seen inside the window so far, of the device that refreshed least; a lower bound."""
        with self._changed:
            end_s = self.end_s if self.end_s else time.perf_counter()
            return min(track.updates_between(self.begin_s, end_s) for track in self._tracks.values())

    @property
    def reason(self) -> str:
        """Why the window cannot be trusted; empty when it can."""
        with self._changed:
            fault = self._fault
        if fault:
            return fault
        for device, track in self._tracks.items():
            if track.problem:
                return f"{device}: {track.problem}"
        if not self._is_closed:
            return "the window is still open"
        if self.updates < self._min_updates:
            return (
                f"the window of {self.duration_s:.3g} s is too short: the meter refreshed {self.updates} times in it, "
                f"fewer than {self._min_updates}"
            )
        return ""

    @property
    def is_valid(self) -> bool:
        """Whether the window is closed, long enough, and nothing went wrong in it."""
        return not self.reason

    @property
    def is_faulty(self) -> bool:
        """Whether something went wrong that no longer window can mend (device lost, counter reset)."""
        return bool(self._fault or any(track.problem for track in self._tracks.values()))

    @property
    def duration_s(self) -> float:
        """Length of the closed window in seconds."""
        return self.end_s - self.begin_s

    @property
    def per_device_j(self) -> dict[str, float]:
        """Joules of each device.

        Raises:
            InvalidMeasurementError: The window is invalid; the message holds the reason.
        """
        if self.reason:
            raise InvalidMeasurementError(f"an energy window must be valid to be read, but {self.reason}")
        return {name: track.energy_between_j(self.begin_s, self.end_s) for name, track in self._tracks.items()}

    @property
    def energy_j(self) -> float:
        """Joules of all devices, gross (idle power included).

        Raises:
            InvalidMeasurementError: The window is invalid; the message holds the reason.
        """
        return sum(self.per_device_j.values())

    def _await_update_after(self, time_s: float) -> None:
        deadline_s = time_s + EDGE_WAIT_S
        with self._changed:
            self._changed.notify_all()
            while not self._fault and not all(track.has_update_after(time_s) for track in self._tracks.values()):
                if not self._changed.wait(max(0.0, deadline_s - time.perf_counter())):
                    return

    def _watch(self) -> None:
        while True:
            try:
                readings = [(channel.device, channel.read(), time.perf_counter()) for channel in self._channels]
            except InvalidMeasurementError as error:
                with self._changed:
                    self._fault = self._fault or str(error)
                    self._changed.notify_all()
                return
            with self._changed:
                for device, value, read_s in readings:
                    self._tracks[device].add(read_s, value)
                self._changed.notify_all()
                if self._is_stopped:
                    return
            time.sleep(self._poll_s)


class EnergyMeter(ABC):
    """A source of joules for a set of devices.

    Attributes:
        name: The kind of meter, as "nvml" or "rapl".
        min_updates: Refreshes a window must span to be valid: with 20, one refresh more or less is 5 %.
    """

    name: ClassVar[str]
    min_updates: ClassVar[int] = 20

    @property
    @abstractmethod
    def source(self) -> str:
        """What is read: "total-energy counter", "integrated power", ..."""

    @property
    @abstractmethod
    def details(self) -> Mapping[str, str]:
        """Facts for the record: driver version, device names, folder."""

    @abstractmethod
    def channels(self) -> tuple[Channel, ...]:
        """The devices that are read, at least one."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the devices have finished what was queued."""

    def window(self) -> EnergyWindow:
        """A window to use once: `with meter.window() as window: run()`, then `window.energy_j`."""
        return EnergyWindow(self.channels(), self.min_updates, self.synchronize)
