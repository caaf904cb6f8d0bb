"""Power of devices on which nothing runs: what a measurement's energy holds that is not the work's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from dse.measurement.meter import DeviceCondition, EnergyMeter

__all__ = ["IdlePower", "measure_idle_power"]

_STEP_S = 0.02


@dataclass(frozen=True)
class IdlePower:
    """Power at rest, with the model resident.

    Attributes:
        power_w: Of all devices together; None when invalid.
        per_device_w: The same, device by device; empty when invalid.
        duration_s: How long it was watched.
        updates: Refreshes of the meter seen.
        conditions: The devices right after.
        is_valid: Whether it can be trusted.
        reason: Why not; empty when valid.
    """

    power_w: float | None
    per_device_w: Mapping[str, float]
    duration_s: float
    updates: int
    conditions: tuple[DeviceCondition, ...]
    is_valid: bool
    reason: str


def measure_idle_power(meter: EnergyMeter, *, min_duration_s: float = 1.0, max_duration_s: float = 20.0) -> IdlePower:
    """Let nothing run, and read the meter until it has refreshed often enough.

    Args:
        meter: An open meter, with the device held by `device_lock`.
        min_duration_s: Shortest rest in seconds.
        max_duration_s: Longest; a meter too slow for it gives an invalid result.
    """
    with meter.window() as window:
        while not window.is_faulty and window.elapsed_s < max_duration_s:
            if window.elapsed_s >= min_duration_s and window.updates >= meter.min_updates:
                break
            time.sleep(_STEP_S)
    conditions = meter.conditions()
    reason = window.reason
    # Other processes spoil a rest as they spoil work; clocks held down do not, since nothing runs.
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
