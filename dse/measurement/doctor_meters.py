"""Every energy meter of this machine, tried: the part of `dse doctor` that reads joules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from dse.errors import InvalidMeasurementError
from dse.measurement.doctor_check import Check
from dse.measurement.faults import NoMeterError
from dse.measurement.idle import measure_idle_power
from dse.measurement.meter import EnergyMeter
from dse.measurement.nvml import NvmlMeter
from dse.measurement.nvml_driver import describe_gpus
from dse.measurement.rapl import POWERCAP_ROOT, RaplMeter

__all__ = ["check_meters"]


def check_meters(*, powercap_root: Path = POWERCAP_ROOT) -> Iterator[Check]:
    """Open each meter, watch how often it refreshes, and read the power at rest; a few seconds a meter."""
    yield _tried("energy meter of cpu", RaplMeter.name, lambda: RaplMeter(powercap_root))
    try:
        gpus = describe_gpus()
    except NoMeterError as error:
        yield Check("energy meter of GPUs", "missing", f"nvml: {error.reason}", error.remedy)
        return
    for gpu in gpus:
        name = f"energy meter of GPU {gpu.index} ({gpu.name}, {gpu.uuid})"
        yield _tried(name, NvmlMeter.name, lambda uuid=gpu.uuid: NvmlMeter([uuid]))  # type: ignore[misc]


def _tried(name: str, kind: str, open_meter: Callable[[], EnergyMeter]) -> Check:
    try:
        meter = open_meter()
        period_s = meter.probe_period_s()
        idle = measure_idle_power(meter)
    except NoMeterError as error:
        return Check(name, "missing", f"{kind}: {error.reason}", error.remedy)
    except InvalidMeasurementError as error:
        return Check(name, "missing", f"{kind}: {error}", "see whether the device answers its own tools")
    period = "refreshes too seldom to tell" if period_s is None else f"refreshes every {1e3 * period_s:.3g} ms"
    detail = f"{kind}: {meter.source}, {period}"
    if idle.power_w is None:
        return Check(name, "missing", f"{detail}; tried, but {idle.reason}", "end what else runs there, and try again")
    states = [
        f"{c.temperature_celsius:g} \N{DEGREE SIGN}C" for c in idle.conditions if c.temperature_celsius is not None
    ]
    seen = ", ".join([f"{idle.power_w:.4g} W at rest over {idle.duration_s:.2g} s", *states])
    return Check(name, "ok", f"{detail}; tried: {seen}")
