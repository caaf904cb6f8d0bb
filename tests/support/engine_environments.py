"""Interpreters of the engines that tests run: `DSE_<ENGINE>_PYTHON`, CI's environment, or this one.

A test whose engine is not installed is skipped; all of them are one line of pytest's summary.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dse.engines import ENGINES, EngineAvailability

Run = Callable[..., tuple[str, str]]
"""`run(*arguments, expect=0)` runs one command, checks its exit code and returns stdout and stderr."""

_BUILT = Path(__file__).parents[2] / ".ci" / "engine_environment"


@functools.cache
def engine_availability(name: str) -> EngineAvailability:
    """Whether an engine is installed, and where."""
    engine = ENGINES[name]
    if name == "vllm" and engine.python_variable not in os.environ:  # the environment that CI built, if it did
        built = subprocess.run([str(_BUILT), "--find", name], capture_output=True, text=True, check=False)
        return engine.availability(built.stdout.strip() or None)
    return engine.availability()


def engine_python(name: str) -> str:
    """The interpreter of an engine; skips the test, in one line, where the engine is not installed."""
    found = engine_availability(name)
    if not found.is_available:
        pytest.skip(f"{ENGINES[name].title} is not installed: {found.problem}; {found.remedy}")
    return found.python


def needs_modules(*names: str) -> None:
    """Skip the test, in one line, unless these modules can be imported here."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")
