"""What is here, what is missing, and what to do about it: the checks of `dse doctor`. None uses the network."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dse.errors import StorageFullError
from dse.files import cache_dir, disk_errors
from dse.kernel import KERNEL_VARIABLE, kernel_problem
from dse.measurement.doctor_check import Check
from dse.measurement.doctor_meters import check_meters
from dse.measurement.environment import package_versions
from dse.measurement.faults import NoMeterError
from dse.measurement.nvml_driver import describe_gpus

__all__ = ["Check", "run_checks"]

_ROOMY_BYTES = 4 * 2**30  # demo model, its float32 factor bank, and air


def run_checks() -> list[Check]:
    """Run every check, without network, in a few seconds a meter and 20 s where the CPU kernel is not built yet.

    Never raises for what it finds.
    """
    return [_torch_build(), *_gpus(), *check_meters(), _kernel(), _cache(), *_versions()]


def _torch_build() -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    detail = f"torch {torch.__version__} ({build}), {torch.get_num_threads()} threads"
    return Check("torch", "ok", detail)


def _kernel() -> Check:
    """Decode steps on a CPU; built where it is not yet, which takes some twenty seconds, once."""
    problem = kernel_problem()
    if not problem:
        return Check("CPU kernel", "ok", "built for this processor")
    remedy = f"install g++, so that mode fast decodes faster on a CPU, and do not set {KERNEL_VARIABLE}"
    return Check("CPU kernel", "note", f"none, torch's own operators are used: {problem}", remedy)


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
        yield Check("GPU", "missing", f"{gpus[0].name} is here, but this torch cannot use it", remedy)
    else:
        yield Check("GPU", "note", "none: models run on the CPU")


def _cache() -> Check:
    folder = cache_dir()
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as stream:
                stream.write(b"dse")
            free_bytes = shutil.disk_usage(folder).free
    except (StorageFullError, OSError) as error:
        return Check("cache folder", "missing", str(error), "set DSE_CACHE to a folder that can be written")
    detail = f"{_short(folder)}, writable, {free_bytes / 2**30:.1f} GiB ({free_bytes} bytes) free"
    if free_bytes < _ROOMY_BYTES:
        return Check("cache folder", "note", detail, "free some room, or set DSE_CACHE to another disk")
    return Check("cache folder", "ok", detail)


def _versions() -> Iterator[Check]:
    for name, version in package_versions().items():
        if name == "torch":
            continue  # its own check says more
        if version is None:
            yield Check(name, "missing", "not installed", f"`pip install {'lowrank-dse' if name == 'dse' else name}`")
        else:
            yield Check(name, "ok", version)


def _short(folder: Path) -> str:
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
