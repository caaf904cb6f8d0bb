"""Power of idle devices: the share of a measurement's energy that is not due to the work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from dse.measurement.meter import DeviceCondition, EnergyMeter

__all__ = ["IdlePower", "measure_idle_power"]

_STEP_S = 0.02


@dataclass(frozen=True)
class IdlePower:
    """Idle power with the model resident.

    Attributes:
        power_w: Power of all devices together; None if invalid.
        per_device_w: Power of each device; empty if invalid.
        updates: Refreshes of the meter seen.
        conditions: Condition of the devices right after.
        is_valid: Whether the measurement is valid.
        reason: Why it is invalid; empty if valid.
    """

    power_w: float | None
    per_device_w: Mapping[str, float]
    duration_s: float
    updates: int
    conditions: tuple[DeviceCondition, ...]
    is_valid: bool
    reason: str


def measure_idle_power(meter: EnergyMeter, *, min_duration_s: float = 1.0, max_duration_s: float = 20.0) -> IdlePower:
    """Run nothing, and read the meter until it has refreshed often enough.

    Args:
        meter: An open meter, with the device held by `device_lock`.
        min_duration_s: Minimum duration in seconds.
        max_duration_s: Maximum duration; a meter that is too slow for it gives an invalid result.
    """
    with meter.window() as window:
        while not window.is_faulty and window.elapsed_s < max_duration_s:
            if window.elapsed_s >= min_duration_s and window.updates >= meter.min_updates:
                break
            time.sleep(_STEP_S)
    conditions = meter.conditions(window.duration_s)
    reason = window.reason
    # Other processes invalidate idle power; throttled clocks do not, since nothing runs.
    reason = reason or "; ".join(p for c in conditions if c.other_processes for p in c.problems)
    per_device_w = {} if reason else {name: j / window.duration_s for name, j in window.per_device_j.items()}
    return IdlePower(
        None if reason else sum(per_device_w.values()),
        per_device_w,
        window.duration_s,
        window.updates,
        conditions,
        not reason,
        reason,
    )
