"""What can go wrong with an energy meter: each fault has a type of its own, and none of them is ever a zero.

```
MeterUnavailableError (dse.errors)
└── NoMeterError                    a meter cannot be opened: `reason` and `remedy` for a table
    ├── NoDriverError               no driver, or it is not loaded, or does not match its library
    ├── MeterPermissionError        it is there, but this user may not read it
    ├── DeviceNotListedError        the device appears in no list of the driver, or is hidden
    ├── MigDeviceError              a MIG device: its energy is that of all instances together
    └── EnergyNotSupportedError     the device has neither an energy counter nor a power reading
InvalidMeasurementError (dse.errors)
└── WindowFault                     a window was spoilt while it was open
    ├── DeviceLostError             the device fell off the bus, or needs a reset
    ├── DriverRestartedError        the driver was unloaded or restarted
    ├── CounterBackwardsError       the counter went backwards
    ├── ReadingFailedError          a reading failed for another reason
    ├── SamplesTooFarApartError     power was read too seldom to be integrated
    ├── WorkInterruptedError        the work raised
    └── WindowTooShortError         the meter refreshed too few times
```
A device without a counter is not a fault as long as its power can be read; the record says which was used, and why.
"""

from __future__ import annotations

from dse.errors import InvalidMeasurementError, MeterUnavailableError

__all__ = [
    "CounterBackwardsError",
    "DeviceLostError",
    "DeviceNotListedError",
    "DriverRestartedError",
    "EnergyNotSupportedError",
    "MeterPermissionError",
    "MigDeviceError",
    "NoDriverError",
    "NoMeterError",
    "ReadingFailedError",
    "SamplesTooFarApartError",
    "WindowFault",
    "WindowTooShortError",
    "WorkInterruptedError",
]


class NoMeterError(MeterUnavailableError):
    """A meter cannot be opened; `meter`, `reason` and `remedy` say the parts of the message for a table."""

    def __init__(self, meter: str, reason: str, remedy: str) -> None:
        super().__init__(f"no energy meter {meter}: {reason}; {remedy}")
        self.meter = meter
        self.reason = reason
        self.remedy = remedy


class NoDriverError(NoMeterError):
    """The driver is not there, is not loaded, or does not match its library."""


class MeterPermissionError(NoMeterError):
    """The meter is there, but this user may not read it."""


class DeviceNotListedError(NoMeterError):
    """The device appears in no list of the driver, or is hidden from this process."""


class MigDeviceError(NoMeterError):
    """The device is split by MIG."""


class EnergyNotSupportedError(NoMeterError):
    """The device has neither an energy counter nor a power reading."""


class WindowFault(InvalidMeasurementError):  # noqa: N818 - a reason that is recorded more often than it is raised
    """A window was spoilt while it was open; its energy is unknown."""


class DeviceLostError(WindowFault):
    """The device fell off the bus, or needs a reset."""


class DriverRestartedError(WindowFault):
    """The driver was unloaded or restarted."""


class CounterBackwardsError(WindowFault):
    """The counter went backwards, and no wrap-around explains it."""


class ReadingFailedError(WindowFault):
    """A reading failed for a reason that has no type of its own."""


class SamplesTooFarApartError(WindowFault):
    """Power was read too seldom to be integrated."""


class WorkInterruptedError(WindowFault):
    """The work that was measured raised."""


class WindowTooShortError(WindowFault):
    """The meter refreshed too few times for the energy to be precise."""
