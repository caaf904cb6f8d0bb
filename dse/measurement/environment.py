"""Hardware, driver, package versions and commit that a measurement ran on, as plain JSON. Never raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TypeAlias

import torch

from dse.measurement.meter_errors import NoMeterError
from dse.measurement.nvml_driver import describe_gpus

__all__ = ["Json", "describe_environment", "device_description", "package_versions"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_DISTRIBUTIONS = {
    "dse": "lowrank-dse",
    "torch": "torch",
    "transformers": "transformers",
    "tensorly": "tensorly",
    "optuna": "optuna",
    "lm_eval": "lm_eval",
    "pandas": "pandas",
    "nvidia-ml-py": "nvidia-ml-py",
}


def describe_environment() -> dict[str, Json]:
    """The machine and software that a measurement record must name; null if unknown."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": {
            "model": _cpu_model(),
            "logical_cores": os.cpu_count(),
            # macOS has no affinity.
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": _memory_bytes(),
        },
        "torch": {
            "version": str(torch.__version__),
            "cuda_build": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": _gpus(),
        "packages": dict(package_versions()),
        "git": _git(),
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions of `dse` and of the libraries that its results depend on; None if not installed."""
    return {name: _version(distribution) for name, distribution in _DISTRIBUTIONS.items()}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Json:
    """All GPUs that the driver lists, with its version; without NVML those that torch sees."""
    try:
        return [{"name": gpu.name, "uuid": gpu.uuid, "driver_version": gpu.driver_version} for gpu in describe_gpus()]
    except NoMeterError:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [{"name": torch.cuda.get_device_name(index)} for index in range(count)]


def device_description(device: torch.device) -> str:
    """Kind and name of a device, such as "cpu AMD EPYC 7B13" or "cuda NVIDIA L4"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return f"{device.type} {name}"


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _git() -> dict[str, Json] | None:
    """Commit of the checkout that this package runs from; None if it was installed from elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _run_git(root, "rev-parse", "HEAD")
    changes = _run_git(root, "status", "--porcelain")
    return None if commit is None else {"commit": commit, "has_changes": None if changes is None else bool(changes)}


def _run_git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
