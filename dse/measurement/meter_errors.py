"""Errors of energy meters, one type per cause. A meter that fails never reports zero.

```
MeterUnavailableError (dse.errors)
└── NoMeterError                    a meter cannot be opened; has `reason` and `remedy` as separate attributes
    ├── NoDriverError               the driver is missing, not loaded, or does not match its library
    ├── MeterPermissionError        this user may not read the meter
    ├── DeviceNotListedError        the driver does not list the device, or it is hidden from this process
    ├── MigDeviceError              the GPU is split by MIG: its energy is that of all instances together
    └── EnergyNotSupportedError     the device has neither an energy counter nor a power reading
InvalidMeasurementError (dse.errors)
└── EnergyWindowError               a window became invalid while it was open
    ├── DeviceLostError             the device fell off the bus, or needs a reset
    ├── DriverRestartedError        the driver was unloaded or restarted
    ├── CounterBackwardsError       the counter went backwards
    ├── ReadingFailedError          a reading failed for another reason
    ├── SamplesTooFarApartError     power was read too rarely to be integrated
    ├── WorkInterruptedError        the measured work raised an exception
    └── WindowTooShortError         the meter refreshed too few times
```
A device without a counter is no error as long as its power can be read; the record names the source that was used.
"""

from __future__ import annotations

from dse.errors import InvalidMeasurementError, MeterUnavailableError

__all__ = [
    "CounterBackwardsError",
    "DeviceLostError",
    "DeviceNotListedError",
    "DriverRestartedError",
    "EnergyNotSupportedError",
    "EnergyWindowError",
    "MeterPermissionError",
    "MigDeviceError",
    "NoDriverError",
    "NoMeterError",
    "ReadingFailedError",
    "SamplesTooFarApartError",
    "WindowTooShortError",
    "WorkInterruptedError",
]


class NoMeterError(MeterUnavailableError):
    """A meter cannot be opened.

    Attributes:
        meter: Kind of meter.
        reason: Why it cannot be opened.
        remedy: What the user can do.
    """

    def __init__(self, meter: str, reason: str, remedy: str) -> None:
        super().__init__(f"no energy meter {meter}: {reason}; {remedy}")
        self.meter = meter
        self.reason = reason
        self.remedy = remedy


class NoDriverError(NoMeterError):
    """The driver is missing, not loaded, or does not match its library."""


class MeterPermissionError(NoMeterError):
    """This user may not read the meter."""


class DeviceNotListedError(NoMeterError):
    """The driver does not list the device, or it is hidden from this process."""


class MigDeviceError(NoMeterError):
    """The GPU is split by MIG."""


class EnergyNotSupportedError(NoMeterError):
    """The device has neither an energy counter nor a power reading."""


class EnergyWindowError(InvalidMeasurementError):
    """A window became invalid while it was open; its energy is unknown."""


class DeviceLostError(EnergyWindowError):
    """The device fell off the bus, or needs a reset."""


class DriverRestartedError(EnergyWindowError):
    """The driver was unloaded or restarted."""


class CounterBackwardsError(EnergyWindowError):
    """The counter went backwards, and no wrap-around explains it."""


class ReadingFailedError(EnergyWindowError):
    """A reading failed for a reason without a type of its own."""


class SamplesTooFarApartError(EnergyWindowError):
    """Power was read too rarely to be integrated."""


class WorkInterruptedError(EnergyWindowError):
    """The measured work raised an exception."""


class WindowTooShortError(EnergyWindowError):
    """The meter refreshed too few times for a precise energy."""
