"""Float64 on devices that have none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import dse
from dse.double_precision import double_device, in_double

_HOST_ONLY = ("export", "double_precision.py", "verification.py", "leading_eigenvectors.py")


@pytest.mark.parametrize(("device", "expected"), [("mps", "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda:1")])
def test_double_precision_runs_where_the_device_has_it(device: str, expected: str) -> None:
    assert double_device(torch.device(device)) == torch.device(expected)


def test_a_tensor_in_double_precision_keeps_its_values() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    found = in_double(weight)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.equal(found.float(), weight)


def test_no_module_converts_to_double_on_its_own() -> None:
    """`.double()` and `.to(torch.float64)` fail on MPS unless the tensor is on the CPU; `in_double` moves it there."""
    root = Path(dse.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if any(part in _HOST_ONLY for part in path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                text = ast.unparse(node)
                is_double = node.func.attr == "double" and ".cpu()" not in text
                is_to = node.func.attr == "to" and "torch.float64" in text and "cpu" not in text
                if is_double or is_to:
                    found.append(f"{path.relative_to(root)}: {text}")
    assert found == []
