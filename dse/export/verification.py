"""Reload exports in a new process in which `dse` cannot be imported, and report the differences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dse.errors import ExportError
from dse.export import reload_check
from dse.export.expectation import Expectation

__all__ = ["ReloadReport", "verify_folders"]


@dataclass(frozen=True)
class ReloadReport:
    """Comparison of a reloaded export with the model it was written from.

    Attributes:
        folder: The export.
        max_difference: Largest absolute difference of an output; None if the folder did not load.
        tolerance: Largest difference allowed.
        problem: Why the export is invalid; "" if it is valid.
    """

    folder: Path
    max_difference: float | None
    tolerance: float
    problem: str

    @property
    def is_valid(self) -> bool:
        """Whether the reload matches."""
        return not self.problem


def verify_folders(checks: Sequence[tuple[Path, Expectation]]) -> tuple[ReloadReport, ...]:
    """Reload each folder and compare it with its expectation, all in one new process without `dse` and network.

    Starting Python, torch and transformers takes longer than reading a small model, so one process checks all folders.
    It holds one model at a time.

    Args:
        checks: Pairs of an exported folder and its expectation.

    Raises:
        ExportError: The process itself failed.
    """
    with tempfile.TemporaryDirectory(prefix="dse-verify-") as temporary:
        request, result = Path(temporary) / "request.json", Path(temporary) / "result.json"
        entries = [{"folder": str(folder.absolute()), "expected": str(e.folder.absolute())} for folder, e in checks]
        request.write_text(json.dumps({"threads": torch.get_num_threads(), "checks": entries}), encoding="utf-8")
        # -P keeps this folder off the module path. Full isolation (-I) would also hide a torch from the user's site
        # packages or PYTHONPATH; the script itself forbids `import dse`.
        command = [sys.executable, "-P", str(Path(reload_check.__file__)), str(request), str(result)]
        environment = _environment(Path(temporary))
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        if process.returncode != 0 or not result.is_file():
            lines = process.stderr.strip().splitlines() or [f"it ended with code {process.returncode}"]
            raise ExportError(f"a new Python process must be able to reload the export, but: {lines[-1][:400]}")
        results = json.loads(result.read_text(encoding="utf-8"))
    return tuple(_report(*check, entry) for check, entry in zip(checks, results, strict=True))


def _environment(cache: Path) -> dict[str, str]:
    """This process's environment, offline, with a temporary cache for modelling code."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "PYTHONINSPECT")}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache / "modules"), "TOKENIZERS_PARALLELISM": "false"}


def _report(folder: Path, expectation: Expectation, result: Mapping[str, Any]) -> ReloadReport:
    if "error" in result:
        problem = f"the folder must load on its own, but: {result['error']}"
        return ReloadReport(folder, None, expectation.tolerance, problem)
    difference = float(result["max_difference"])
    problems = []
    if not difference <= expectation.tolerance:
        problems.append(
            f"the reloaded outputs must differ by at most {expectation.tolerance:g}, but differ by {difference:g}"
            f" (computed on {result['device']})"
        )
    for key, what in (("differing_weights", "weights that changed"), ("differing_texts", "texts with other token ids")):
        if result[key]:
            problems.append(f"there must be no {what}, but there are {len(result[key])} (first: {result[key][0]!r})")
    return ReloadReport(folder, difference, expectation.tolerance, "; ".join(problems))
