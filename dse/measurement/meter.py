"""The interface of every energy meter, and the condition of the devices it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dse.measurement.energy_window import POLL_S, EnergyWindow
from dse.measurement.readings import Channel

__all__ = ["DeviceCondition", "EnergyMeter"]


@dataclass(frozen=True)
class DeviceCondition:
    """Condition of a device at one moment; None and () if the device does not report it.

    Attributes:
        device: Its name in records.
        temperature_celsius: Temperature of the chip.
        core_clock_mhz: Clock of its processors.
        memory_clock_mhz: Clock of its memory.
        clock_limits: What limits the clocks, in the driver's terms: "sw_power_cap", "hw_thermal_slowdown", ...
        throttled_by: The limits that invalidate a measurement. The configured power limit is not one of them: the card
            runs at it under load, for candidate and baseline alike.
        other_contexts: Ids of other processes that hold a context on the device, such as a notebook; for information.
        other_processes: Ids of the other processes that computed on the device; see `EnergyMeter.conditions`.
        use_is_known: Whether the device tells if other processes compute on it.
        power_w: Power draw at that moment.
        load_average: Load of the machine over the last minute, for CPUs; for information only.
    """

    device: str
    temperature_celsius: float | None = None
    core_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    clock_limits: tuple[str, ...] = ()
    throttled_by: tuple[str, ...] = ()
    other_contexts: tuple[int, ...] = ()
    other_processes: tuple[int, ...] = ()
    use_is_known: bool = True
    power_w: float | None = None
    load_average: float | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Why a measurement in this condition is invalid."""
        found = []
        if self.throttled_by:
            found.append(f"{self.device} was throttled ({', '.join(self.throttled_by)})")
        if self.other_processes:
            found.append(f"{self.device} was used by other processes ({', '.join(map(str, self.other_processes))})")
        return tuple(found)


class EnergyMeter(ABC):
    """A source of joules for a set of devices.

    Attributes:
        name: Kind of meter: "nvml", "rapl" or "replay".
        min_updates: Refreshes that a valid window must span: with 20, one refresh more or less is 5 %.
        is_replay: Whether it replays a recording; its values are never shown as measured.
        source: What the meter reads, such as "NVML total-energy counter".
        details: Details for the record: driver version, device names, folder.
        period_s: Seconds between two refreshes; None if not known in advance.
    """

    name: ClassVar[str]
    min_updates: ClassVar[int] = 20
    is_replay: ClassVar[bool] = False
    source: str
    details: Mapping[str, str]
    period_s: float | None = None

    def probe_period_s(self) -> float | None:
        """The refresh period measured for up to a second; None if no change was seen."""
        return self.period_s

    @abstractmethod
    def channels(self) -> tuple[Channel, ...]:
        """The devices that the meter reads, at least one."""

    def synchronize(self) -> None:  # noqa: B027 - most meters have nothing to wait for
        """Wait until the devices have finished their queued work; CPU work has finished when its call returns."""

    def conditions(self, window_s: float | None = None) -> tuple[DeviceCondition, ...]:
        """Current condition of the devices; () if the meter does not report it.

        Args:
            window_s: Length of the window that has just ended, in which other processes may have used the devices;
                None before a window.
        """
        return ()

    def window(self, min_updates: int | None = None) -> EnergyWindow:
        """A window for one use: `with meter.window() as window: run()`, then `window.energy_j`.

        Args:
            min_updates: Refreshes that it must span to be valid; the meter's own number by default.
        """
        wanted = self.min_updates if min_updates is None else min_updates
        poll_s = POLL_S if self.period_s is None else min(POLL_S, self.period_s / 2)
        return EnergyWindow(self.channels(), wanted, self.synchronize, poll_s)
