from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dse.kernel import KERNEL_VARIABLE, NO_KERNEL

ROOT = Path(__file__).parents[2]


def said(tmp_path, **variables):
    """What a process of its own says of the kernel: its name, and why there is none."""
    program = "from dse.kernel import *; print(kernel_name(), '|', kernel_problem())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DSE_CACHE": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    name, _, problem = done.stdout.strip().partition(" | ")
    return name, problem


def test_it_can_be_turned_off(tmp_path):
    assert said(tmp_path, **{KERNEL_VARIABLE: "off"}) == (NO_KERNEL, f"{KERNEL_VARIABLE}=off")


def test_without_a_compiler_there_is_no_kernel_and_the_reason_is_told(tmp_path):
    empty = tmp_path / "nothing"
    empty.mkdir()
    name, problem = said(tmp_path, PATH=str(empty), CXX="")
    assert name == NO_KERNEL
    assert "no C++ compiler" in problem


def test_a_compiler_that_fails_is_named_and_leaves_nothing(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'out of patience' >&2\nexit 1\n")
    broken.chmod(0o755)
    name, problem = said(tmp_path, CXX=str(broken))
    assert name == NO_KERNEL
    assert str(broken) in problem
    assert "out of patience" in problem
    assert list((tmp_path / "kernels").iterdir()) == []
