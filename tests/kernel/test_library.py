from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_compiler

from dse.kernel import KERNEL_VARIABLE, NO_KERNEL, kernel_name, kernel_problem

ROOT = Path(__file__).parents[2]


@needs_compiler
def test_where_there_is_a_compiler_there_is_a_kernel():
    assert kernel_problem() == ""
    assert kernel_name(torch.device("cpu"), torch.float32).startswith("dse ")


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_what_it_is_not_meant_for_is_left_to_torch(device, dtype):
    assert kernel_name(torch.device(device), dtype) == NO_KERNEL


def said(tmp_path, **variables):
    """What a process of its own says of the kernel: its name, and why there is none."""
    program = (
        "import torch; from dse.kernel import kernel_name, kernel_problem;"
        "print(kernel_name(torch.device('cpu'), torch.float32), '|', kernel_problem())"
    )
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
