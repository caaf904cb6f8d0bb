"""Read exports back from disk in a fresh process, where `dse` cannot be imported, and say what differs."""

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
    """How a reloaded export compares with the model it was written from.

    Attributes:
        folder: The export.
        max_difference: Largest absolute difference of an output; None where the folder did not load.
        tolerance: What was allowed.
        problem: Why the export may not be used; "" where it may.
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
    """Reload each folder and compare it with its expectation, all in one fresh process without `dse` and network.

    Starting Python, torch and transformers takes longer than reading a small model, hence many folders at once; one
    model is held at a time.

    Args:
        checks: Pairs of an exported folder and what it must give back.

    Raises:
        ExportError: The process itself could not do its work.
    """
    with tempfile.TemporaryDirectory(prefix="dse-verify-") as temporary:
        request, result = Path(temporary) / "request.json", Path(temporary) / "result.json"
        entries = [{"folder": str(folder.absolute()), "expected": str(e.folder.absolute())} for folder, e in checks]
        request.write_text(json.dumps({"threads": torch.get_num_threads(), "checks": entries}), encoding="utf-8")
        # -P keeps this folder off the module path. Full isolation (-I) would also hide a torch that the user installed
        # for themselves or put on PYTHONPATH; the script forbids `import dse` on its own.
        command = [sys.executable, "-P", str(Path(reload_check.__file__)), str(request), str(result)]
        process = subprocess.run(
            command,
            env=_environment(Path(temporary)),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if process.returncode != 0 or not result.is_file():
            lines = process.stderr.strip().splitlines() or [f"it ended with code {process.returncode}"]
            raise ExportError(f"a fresh Python process must be able to reload the export, but: {lines[-1][:400]}")
        results = json.loads(result.read_text(encoding="utf-8"))
    return tuple(_report(*check, outcome) for check, outcome in zip(checks, results, strict=True))


def _environment(cache: Path) -> dict[str, str]:
    """This process's environment, offline, with a throw-away cache for the modelling code."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "PYTHONINSPECT")}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache / "modules"), "TOKENIZERS_PARALLELISM": "false"}


def _report(folder: Path, expectation: Expectation, outcome: Mapping[str, Any]) -> ReloadReport:
    if "error" in outcome:
        problem = f"the folder must load by itself, but: {outcome['error']}"
        return ReloadReport(folder, None, expectation.tolerance, problem)
    difference = float(outcome["max_difference"])
    problems = []
    if not difference <= expectation.tolerance:
        problems.append(
            f"the reloaded outputs must differ by at most {expectation.tolerance:g}, but differ by {difference:g}"
            f" (computed on {outcome['device']})"
        )
    for key, what in (
        ("differing_weights", "weights that changed"),
        ("differing_texts", "texts that tokenise otherwise"),
    ):
        if outcome[key]:
            problems.append(f"there must be no {what}, but there are {len(outcome[key])} (first: {outcome[key][0]!r})")
    return ReloadReport(folder, difference, expectation.tolerance, "; ".join(problems))
