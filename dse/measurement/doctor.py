"""Checks of the installation for `dse doctor`: what is available, what is missing, and the remedy. Works offline."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dse.errors import InvalidMeasurementError, StorageFullError
from dse.files import cache_dir, disk_errors
from dse.measurement.environment import package_versions
from dse.measurement.idle_power import measure_idle_power
from dse.measurement.meter import EnergyMeter
from dse.measurement.meter_errors import NoMeterError
from dse.measurement.nvml import NvmlMeter
from dse.measurement.nvml_driver import describe_gpus
from dse.measurement.rapl import RaplMeter

__all__ = ["Check", "run_checks"]

_ENOUGH_BYTES = 4 * 2**30  # the demo model, its factor bank in float32, and some reserve


@dataclass(frozen=True)
class Check:
    """One result: "ok", "missing" (something will not work) or "note" (worth knowing, nothing is broken)."""

    name: str
    status: Literal["ok", "missing", "note"]
    detail: str
    remedy: str = ""


def run_checks() -> list[Check]:
    """Run every check, offline, in a few seconds per meter. Problems are results, never exceptions."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    detail = f"torch {torch.__version__} ({build}), {torch.get_num_threads()} threads"
    return [Check("torch", "ok", detail), *_gpus(), *_meters(), _cache_folder(), *_versions()]


def _gpus() -> Iterator[Check]:
    try:
        gpus = describe_gpus()
    except NoMeterError as error:
        yield Check("GPU driver", "note", error.reason, error.remedy)
        gpus = []
    if gpus:
        yield Check("GPU driver", "ok", f"NVIDIA driver {gpus[0].driver_version}, {len(gpus)} GPUs")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Check("GPU", "ok", ", ".join(names))
    elif gpus:
        remedy = "install a CUDA build of torch (pytorch.org/get-started), or check CUDA_VISIBLE_DEVICES"
        yield Check("GPU", "missing", f"{gpus[0].name} is installed, but this torch cannot use it", remedy)
    else:
        yield Check("GPU", "note", "none: models run on the CPU")


def _meters() -> Iterator[Check]:
    """Open each meter, measure its refresh period, and read the idle power; a few seconds per meter."""
    yield _tried_meter("energy meter of cpu", RaplMeter.name, RaplMeter)
    try:
        gpus = describe_gpus()
    except NoMeterError as error:
        yield Check("energy meter of GPUs", "missing", f"nvml: {error.reason}", error.remedy)
        return
    for gpu in gpus:
        name = f"energy meter of GPU {gpu.index} ({gpu.name}, {gpu.uuid})"
        yield _tried_meter(name, NvmlMeter.name, lambda uuid=gpu.uuid: NvmlMeter([uuid]))  # type: ignore[misc]


def _tried_meter(name: str, kind: str, open_meter: Callable[[], EnergyMeter]) -> Check:
    try:
        meter = open_meter()
        period_s = meter.probe_period_s()
        idle = measure_idle_power(meter)
    except NoMeterError as error:
        return Check(name, "missing", f"{kind}: {error.reason}", error.remedy)
    except InvalidMeasurementError as error:
        return Check(name, "missing", f"{kind}: {error}", "check the device with its vendor's tools")
    period = "refresh period unknown" if period_s is None else f"refreshes every {1e3 * period_s:.3g} ms"
    detail = f"{kind}: {meter.source}, {period}"
    if idle.power_w is None:
        return Check(name, "missing", f"{detail}; tried, but {idle.reason}", "stop other work on the device and retry")
    temperatures = [
        f"{c.temperature_celsius:g} \N{DEGREE SIGN}C" for c in idle.conditions if c.temperature_celsius is not None
    ]
    seen = ", ".join([f"{idle.power_w:.4g} W idle over {idle.duration_s:.2g} s", *temperatures])
    return Check(name, "ok", f"{detail}; tried: {seen}")


def _cache_folder() -> Check:
    folder = cache_dir()
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as stream:
                stream.write(b"dse")
            free_bytes = shutil.disk_usage(folder).free
    except (StorageFullError, OSError) as error:
        return Check("cache folder", "missing", str(error), "set DSE_CACHE to a writable folder")
    detail = f"{_short(folder)}, writable, {free_bytes / 2**30:.1f} GiB ({free_bytes} bytes) free"
    if free_bytes < _ENOUGH_BYTES:
        return Check("cache folder", "note", detail, "free some space, or set DSE_CACHE to another disk")
    return Check("cache folder", "ok", detail)


def _versions() -> Iterator[Check]:
    for name, version in package_versions().items():
        if name == "torch":
            continue  # has a check of its own
        if version is None:
            yield Check(name, "missing", "not installed", f"`pip install {'lowrank-dse' if name == 'dse' else name}`")
        else:
            yield Check(name, "ok", version)


def _short(folder: Path) -> str:
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
