"""The scripted NVML library: build it, and make the environment of a process that loads it in place of a driver's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build_library(folder: Path) -> Path:
    """Compile fake_nvml.c as `libnvidia-ml.so.1` in `folder`; skips the test without a compiler."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux to build the scripted NVML library")
    target = folder / "libnvidia-ml.so.1"
    build = [COMPILER, "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(target), str(HERE / "fake_nvml.c")]
    subprocess.run(build, check=True)
    return folder


def with_library(folder: Path, **script: str) -> dict[str, str]:
    """An environment in which the dynamic linker finds the library; `script` sets its variables FAKE_NVML_<name>.

    The folder comes before the system's, so the library also takes the place of an installed driver's. CUDA's GPUs are
    hidden, because torch would look for its own through the same library. GPUs are therefore named by UUID.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(folder), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONPATH"] = str(HERE.parents[1])
    return environment | {f"FAKE_NVML_{name}": value for name, value in script.items()}
