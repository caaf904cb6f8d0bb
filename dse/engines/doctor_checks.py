"""Checks of the serving engines for `dse doctor`."""

from __future__ import annotations

from dse.engines.registry import ENGINES
from dse.measurement.doctor import Check

__all__ = ["engine_checks"]


def engine_checks() -> list[Check]:
    """One check for each engine, in the interpreter that a study would use; a missing engine is optional."""
    found = []
    for engine in ENGINES.values():
        seen = engine.availability()
        name = f"engine {engine.name}"
        if seen.is_available:
            versions = ", ".join(f"{package} {version}" for package, version in seen.versions.items())
            found.append(Check(name, "ok", f"{versions} in {seen.python}"))
        else:
            found.append(Check(name, "note", seen.problem, seen.remedy))
    return found
