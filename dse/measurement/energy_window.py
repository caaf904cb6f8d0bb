"""A window over a meter's readings that gives the joules of the work inside it.

A background thread polls the devices. The window starts right after an update and polls until one update after its end,
so the error is that of the clock at two edges rather than two update periods.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from dse.measurement.meter_errors import EnergyWindowError, WindowTooShortError, WorkInterruptedError
from dse.measurement.readings import EDGE_WAIT_S, Channel

__all__ = ["POLL_S", "EnergyWindow"]

POLL_S = 0.01  # while the work runs: rare enough not to slow it down measurably
EDGE_POLL_S = 0.001  # while only waiting for an update


class EnergyWindow:
    """Energy of the work inside a `with` block; created by `EnergyMeter.window`.

    Attributes:
        begin_s: Start of the window on `time.perf_counter`.
        end_s: End of the window, valid after the block.
    """

    def __init__(
        self, channels: tuple[Channel, ...], min_updates: int, synchronize: Callable[[], None], poll_s: float = POLL_S
    ) -> None:
        self._channels = channels
        self._readings = {channel.device: channel.new_readings() for channel in channels}
        self._min_updates = min_updates
        self._synchronize = synchronize
        self._work_poll_s = poll_s
        self._changed = threading.Condition()
        self._poll_s = EDGE_POLL_S
        self._is_stopped = False
        self._is_closed = False
        self._error: EnergyWindowError | None = None
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
                self._error = self._error or WorkInterruptedError(f"the work was interrupted by {type(error).__name__}")
        finally:
            with self._changed:
                self._is_stopped = True
                self._changed.notify_all()
            self._thread.join()
            self._is_closed = True

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the open window."""
        return time.perf_counter() - self.begin_s

    @property
    def updates(self) -> int:
        """Refreshes inside the window so far, of the device with the fewest; a lower bound."""
        with self._changed:
            end_s = self.end_s if self.end_s else time.perf_counter()
            return min(readings.updates_between(self.begin_s, end_s) for readings in self._readings.values())

    @property
    def problem(self) -> EnergyWindowError | None:
        """Why the window is invalid; None if it is valid."""
        with self._changed:
            if self._error is not None:
                return self._error
            for device, readings in self._readings.items():
                if readings.problem is not None:
                    return type(readings.problem)(f"{device}: {readings.problem}")
        if not self._is_closed:
            return EnergyWindowError("the window is still open")
        if self.updates < self._min_updates:
            return WindowTooShortError(
                f"the window of {self.duration_s:.3g} s is too short: the meter refreshed {self.updates} times in it, "
                f"fewer than {self._min_updates}"
            )
        return None

    @property
    def reason(self) -> str:
        """Why the window is invalid; empty if it is valid."""
        return str(self.problem or "")

    @property
    def is_valid(self) -> bool:
        """Whether the window is closed, long enough and free of errors."""
        return self.problem is None

    @property
    def is_faulty(self) -> bool:
        """Whether an error occurred that a longer window would not fix (device lost, counter reset)."""
        return self._error is not None or any(readings.problem is not None for readings in self._readings.values())

    @property
    def duration_s(self) -> float:
        """Length of the closed window in seconds."""
        return self.end_s - self.begin_s

    @property
    def per_device_j(self) -> dict[str, float]:
        """Joules of each device.

        Raises:
            EnergyWindowError: The window is invalid; type and message give the reason.
        """
        problem = self.problem
        if problem is not None:
            raise type(problem)(f"an energy window must be valid to be read, but {problem}")
        return {name: readings.energy_between_j(self.begin_s, self.end_s) for name, readings in self._readings.items()}

    @property
    def energy_j(self) -> float:
        """Joules of all devices, gross of idle power.

        Raises:
            EnergyWindowError: The window is invalid; type and message give the reason.
        """
        return sum(self.per_device_j.values())

    def _await_update_after(self, time_s: float) -> None:
        deadline_s = time_s + EDGE_WAIT_S
        with self._changed:
            self._changed.notify_all()
            while self._error is None and not all(one.has_update_after(time_s) for one in self._readings.values()):
                if not self._changed.wait(max(0.0, deadline_s - time.perf_counter())):
                    return

    def _watch(self) -> None:
        while True:
            try:
                readings = [(channel.device, channel.read(), time.perf_counter()) for channel in self._channels]
            except EnergyWindowError as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                for device, value, read_s in readings:
                    self._readings[device].add(read_s, value)
                self._changed.notify_all()
                if self._is_stopped:
                    return
            time.sleep(self._poll_s)
