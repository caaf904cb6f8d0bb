"""Ask another Python interpreter which packages it has."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["installed_versions"]

_QUERY = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""

_TIME_LIMIT_S = 60.0


def installed_versions(python: str, packages: Sequence[str]) -> tuple[Mapping[str, str], str]:
    """Versions of the packages that are installed there, and why the interpreter does not run ("" if it does).

    Args:
        python: Path of the interpreter, or its name on PATH.
        packages: Names of distributions.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [str(Path(python).expanduser()), "-c", _QUERY, *packages],
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
            env=environment,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return {}, f"{python} is not a working Python interpreter ({last[:200]})"
        found: dict[str, str] = json.loads(done.stdout)
    except FileNotFoundError:
        return {}, f"the interpreter {python} does not exist"
    except subprocess.TimeoutExpired:
        return {}, f"{python} did not answer within {_TIME_LIMIT_S:g} s"
    except (OSError, ValueError) as error:
        return {}, f"{python} is not a working Python interpreter ({str(error)[:200]})"
    return found, ""
