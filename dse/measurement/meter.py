"""What every energy meter is: a source of joules for some devices, and what it knows of their condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dse.measurement.energy_window import POLL_S, EnergyWindow
from dse.measurement.track import Channel

__all__ = ["DeviceCondition", "EnergyMeter"]


@dataclass(frozen=True)
class DeviceCondition:
    """How a device was at one moment; None and () where it does not say.

    Attributes:
        device: Its name in records.
        temperature_celsius: Of the chip.
        core_clock_mhz: Clock of its processors at that moment.
        memory_clock_mhz: Clock of its memory.
        clock_limits: What holds the clocks down, in the driver's words: "sw_power_cap", "hw_thermal_slowdown", ...
        throttled_by: Those of them that are a fault. Running at the power limit that the card is set to is not: that is
            how it works under load, and it is the same for dense and point.
        other_processes: Process ids of others that compute on it.
        load_average: Of the machine over the last minute, for CPUs; says how busy it was, and invalidates nothing.
    """

    device: str
    temperature_celsius: float | None = None
    core_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    clock_limits: tuple[str, ...] = ()
    throttled_by: tuple[str, ...] = ()
    other_processes: tuple[int, ...] = ()
    load_average: float | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Why a measurement taken now cannot be trusted."""
        found = []
        if self.throttled_by:
            found.append(f"{self.device} was throttled ({', '.join(self.throttled_by)})")
        if self.other_processes:
            found.append(f"{self.device} was used by other processes ({', '.join(map(str, self.other_processes))})")
        return tuple(found)


class EnergyMeter(ABC):
    """A source of joules for a set of devices.

    Attributes:
        name: The kind of meter: "nvml", "rapl" or "replay".
        min_updates: Refreshes a window must span to be valid: with 20, one refresh more or less is 5 %.
        is_replay: Whether it plays a recording instead of measuring; its figures are never shown as measured.
    """

    name: ClassVar[str]
    min_updates: ClassVar[int] = 20
    is_replay: ClassVar[bool] = False

    @property
    @abstractmethod
    def source(self) -> str:
        """What is read: "total-energy counter", "integrated power", ..."""

    @property
    @abstractmethod
    def details(self) -> Mapping[str, str]:
        """Facts for the record: driver version, device names, folder."""

    @property
    def period_s(self) -> float | None:
        """Seconds between two refreshes, where it is known beforehand."""
        return None

    def probe_period_s(self) -> float | None:
        """The period found by watching, for up to a second; None where nothing was seen to change."""
        return self.period_s

    @abstractmethod
    def channels(self) -> tuple[Channel, ...]:
        """The devices that are read, at least one."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the devices have finished what was queued."""

    def conditions(self) -> tuple[DeviceCondition, ...]:
        """How the devices are now; () where the meter knows nothing of it."""
        return ()

    def window(self, min_updates: int | None = None) -> EnergyWindow:
        """A window to use once: `with meter.window() as window: run()`, then `window.energy_j`.

        Args:
            min_updates: Refreshes it must span to be valid; the meter's own number by default.
        """
        wanted = self.min_updates if min_updates is None else min_updates
        poll_s = POLL_S if self.period_s is None else min(POLL_S, self.period_s / 2)
        return EnergyWindow(self.channels(), wanted, self.synchronize, poll_s)
