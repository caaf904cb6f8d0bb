"""The window that turns a meter's readings into the joules of the work inside it.

It watches the devices from a background thread, begins right after an update, and goes on watching until one update
after its end. What is left is the error of the clock at two edges, not of two update periods.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from dse.measurement.faults import WindowFault, WindowTooShortError, WorkInterruptedError
from dse.measurement.track import EDGE_WAIT_S, Channel

__all__ = ["POLL_S", "EnergyWindow"]

POLL_S = 0.01  # while work runs: rare enough to cost the work nothing that can be seen
EDGE_POLL_S = 0.001  # while nothing runs but the wait for an update


class EnergyWindow:
    """Energy of the work between entering and leaving; made by `EnergyMeter.window`.

    After the block `begin_s` and `end_s` hold the window's bounds on `time.perf_counter`.
    """

    def __init__(
        self,
        channels: tuple[Channel, ...],
        min_updates: int,
        synchronize: Callable[[], None],
        poll_s: float = POLL_S,
    ) -> None:
        self._channels = channels
        self._tracks = {channel.device: channel.new_track() for channel in channels}
        self._min_updates = min_updates
        self._synchronize = synchronize
        self._work_poll_s = poll_s
        self._changed = threading.Condition()
        self._poll_s = EDGE_POLL_S
        self._is_stopped = False
        self._is_closed = False
        self._fault: WindowFault | None = None
        self._thread = threading.Thread(target=self._watch, name="dse-energy", daemon=True)
        self.begin_s = 0.0
        self.end_s = 0.0

    def __enter__(self) -> EnergyWindow:
        self._synchronize()
        entered_s = time.perf_counter()
        self._thread.start()
        self._await_update_after(entered_s)
        self._poll_s = self._work_poll_s
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
                self._fault = self._fault or WorkInterruptedError(f"the work was interrupted by {type(error).__name__}")
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
    def problem(self) -> WindowFault | None:
        """What spoilt the window, by its type; None when it can be trusted."""
        with self._changed:
            if self._fault is not None:
                return self._fault
            for device, track in self._tracks.items():
                if track.problem is not None:
                    return type(track.problem)(f"{device}: {track.problem}")
        if not self._is_closed:
            return WindowFault("the window is still open")
        if self.updates < self._min_updates:
            return WindowTooShortError(
                f"the window of {self.duration_s:.3g} s is too short: the meter refreshed {self.updates} times in it, "
                f"fewer than {self._min_updates}"
            )
        return None

    @property
    def reason(self) -> str:
        """Why the window cannot be trusted; empty when it can."""
        return str(self.problem or "")

    @property
    def is_valid(self) -> bool:
        """Whether the window is closed, long enough, and nothing went wrong in it."""
        return self.problem is None

    @property
    def is_faulty(self) -> bool:
        """Whether something went wrong that no longer window can mend (device lost, counter reset)."""
        return self._fault is not None or any(track.problem is not None for track in self._tracks.values())

    @property
    def duration_s(self) -> float:
        """Length of the closed window in seconds."""
        return self.end_s - self.begin_s

    @property
    def per_device_j(self) -> dict[str, float]:
        """Joules of each device.

        Raises:
            WindowFault: The window is invalid; the type and the message say why.
        """
        problem = self.problem
        if problem is not None:
            raise type(problem)(f"an energy window must be valid to be read, but {problem}")
        return {name: track.energy_between_j(self.begin_s, self.end_s) for name, track in self._tracks.items()}

    @property
    def energy_j(self) -> float:
        """Joules of all devices, gross (idle power included).

        Raises:
            WindowFault: The window is invalid; the type and the message say why.
        """
        return sum(self.per_device_j.values())

    def _await_update_after(self, time_s: float) -> None:
        deadline_s = time_s + EDGE_WAIT_S
        with self._changed:
            self._changed.notify_all()
            while self._fault is None and not all(track.has_update_after(time_s) for track in self._tracks.values()):
                if not self._changed.wait(max(0.0, deadline_s - time.perf_counter())):
                    return

    def _watch(self) -> None:
        while True:
            try:
                readings = [(channel.device, channel.read(), time.perf_counter()) for channel in self._channels]
            except WindowFault as error:
                with self._changed:
                    self._fault = self._fault or error
                    self._changed.notify_all()
                return
            with self._changed:
                for device, value, read_s in readings:
                    self._tracks[device].add(read_s, value)
                self._changed.notify_all()
                if self._is_stopped:
                    return
            time.sleep(self._poll_s)
