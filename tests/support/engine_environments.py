"""Interpreters of the engines that tests run: `DSE_<ENGINE>_PYTHON`, or this one if it has the engine."""

from __future__ import annotations

import importlib.util

import pytest

from dse.engines import ENGINES


def engine_python(name: str) -> str:
    """The interpreter of an engine; skips the test, in one line, where the engine is not installed."""
    found = ENGINES[name].availability()
    if not found.is_available:
        pytest.skip(f"{ENGINES[name].title} is not installed: {found.problem}; {found.remedy}")
    return found.python


def needs_modules(*names: str) -> None:
    """Skip the test, in one line, unless these modules can be imported here."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")
