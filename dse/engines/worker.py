"""The engine's side: runs in the engine's own interpreter, loads one model, and answers calls over pipes.

Run as a script, `python worker.py BACKEND`, with a backend file beside this one. It imports nothing of dse, because the
engine's environment does not have it. Each line of stdin is a JSON call, `{"call": "run", "arguments": {...}}`; each
line of the answer is `{"result": ...}` or `{"error": text, "kind": "failure" | "memory" | "unsupported"}`.

A backend file defines a class `Backend` with

- `load(folder, options)`: load the model. `options` has "device", "dtype", "threads", and the user's own.
- `run(work)`: serve requests; `work` and the result have the fields of `EngineWork` and `EngineWindow`.
- `greedy(prompts, new_tokens)`, `log_probabilities(prompts)`, `time_products(shapes, footprint_bytes)`: as in
  `EngineSession`.
- `versions()`: package to version.
- `close()`: end helper processes.

It raises `Unsupported` (from `backend_support`) for what the engine cannot do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

_CALLS = ("load", "run", "greedy", "log_probabilities", "time_products", "versions", "close")


def main() -> None:
    """Answer calls until `close` or the end of stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the engine prints goes to stderr, not among the answers
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != here]
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _module("backend_support", here)
    backend: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["call"] not in _CALLS:
                raise ValueError(f"no such call: {request['call']}")
            if backend is None:
                backend = _module(sys.argv[1], here).Backend()
            result = getattr(backend, request["call"])(**request["arguments"])
            answer = {"result": result}
        except BaseException as error:  # noqa: BLE001 - every error is reported to the other side
            traceback.print_exc()
            text = " ".join(str(error).split()) or "no message"
            answer = {"error": f"{type(error).__name__}: {text}"[:2000], "kind": _kind(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if request["call"] == "close":
            break
    sys.stderr.flush()
    os._exit(0)  # engines leave threads that would delay the exit


def _module(name: str, folder: Path) -> ModuleType:
    """Import a file of this folder under its own name, without adding the folder to the module search path."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None  # noqa: S101 - the path ends in .py
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _kind(error: BaseException) -> str:
    if type(error).__name__ == "Unsupported":
        return "unsupported"
    text = f"{type(error).__name__} {error}".lower()
    is_memory = "outofmemory" in text or "out of memory" in text or isinstance(error, MemoryError)
    return "memory" if is_memory else "failure"


def _end_with_parent(parent: int) -> None:
    """Kill this process group when the parent has died: it can then neither ask nor clean up."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
