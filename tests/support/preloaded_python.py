"""Python processes that start with torch, transformers and dse already imported.

An interpreter takes ten seconds to import these; a process that is forked from one takes a moment. `Preloaded` is the
process that waits to be forked. `Preloaded.executable` is a program that takes Python's arguments, so that Ray can
start its workers with it (`runtime_env: {py_executable: ...}`). Forked processes are like any other: they have their
own memory, environment and id, and die alone. Each first runs the code in its environment variable `PRELOADED_FIRST`.

Ray itself is not imported before the fork, because its threads would not survive it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_IMPORTED = (
    "torch._dynamo",
    "dse.cli",
    "dse.workers.study_worker",
    "dse.study",
    "dse.evaluation.lm_eval.evaluator",
    "datasets",
)


@dataclass
class Process:
    """A forked process.

    Attributes:
        pid: Its id.
        returncode: Its exit status, negative if a signal ended it; None while it runs.
    """

    pid: int
    returncode: int | None
    _connection: socket.socket

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end, or return None after this time."""
        if self.returncode is None:
            self._connection.settimeout(timeout_s)
            with contextlib.suppress(TimeoutError):
                self.returncode = _receive(self._connection)["status"]
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Preloaded:
    """The process that waits to be forked.

    Args:
        folder: For its socket and its program; a short path.
        environment: Its environment, of which some variables are read by imports.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._socket, self.executable = folder / "fork.sock", folder / "python"
        command = f'exec "{sys.executable}" -E -S "{Path(__file__).resolve()}" connect "{self._socket}" "$@"\n'
        self.executable.write_text(f"#!/bin/sh\n{command}")
        self.executable.chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(self._socket)], env=dict(environment), start_new_session=True
        )
        while not self._socket.exists():
            if self._process.poll() is not None:
                raise AssertionError(f"the preloaded process ended with {self._process.returncode}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The waiting process, the ancestor of all forked ones."""
        return self._process.pid

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Process:
        """Start Python with these arguments; stdout and stderr go to a file."""
        with output.open("ab") as stream:
            return _ask(self._socket, list(arguments), dict(environment), (0, stream.fileno(), stream.fileno()))

    def close(self) -> None:
        """End the waiting process; forked ones stay."""
        self._process.kill()
        self._process.wait()


def _ask(path: Path, arguments: list[str], environment: dict[str, str], files: tuple[int, int, int]) -> Process:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    request = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}  # noqa: PTH109
    socket.send_fds(connection, [b"f"], list(files))
    _send(connection, request)
    return Process(_receive(connection)["pid"], None, connection)


def _send(connection: socket.socket, value: Any) -> None:
    content = json.dumps(value).encode()
    connection.sendall(len(content).to_bytes(8, "big") + content)


def _receive(connection: socket.socket) -> Any:
    def exactly(count: int) -> bytes:
        content = b""
        while len(content) < count:
            if not (part := connection.recv(count - len(content))):
                raise ConnectionError("the preloaded process ended")
            content += part
        return content

    return json.loads(exactly(int.from_bytes(exactly(8), "big")))


def accept_noisy_latencies() -> None:
    """Nothing here may depend on timing: on a busy machine, latencies of microseconds are refused as too noisy."""
    from dse.measurement import latency

    latency.MAX_INTERVAL_FACTOR = math.inf


def _serve(path: Path) -> None:
    import importlib

    for name in _IMPORTED:
        importlib.import_module(name)
    accept_noisy_latencies()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path.with_suffix(".new")))
    server.listen(64)
    path.with_suffix(".new").rename(path)
    while True:
        connection, _ = server.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        request = _receive(connection)
        if os.fork() == 0:
            server.close()
            _watch(connection, request, files)
        for file in (connection.fileno(), *files):
            os.close(file)
        connection.detach()


def _watch(connection: socket.socket, request: Mapping[str, Any], files: Sequence[int]) -> None:
    """Fork the process, and report its id and its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(request, files)
    for file in files:
        os.close(file)
    with contextlib.suppress(OSError):
        _send(connection, {"pid": pid})
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        _send(connection, {"status": os.waitstatus_to_exitcode(status)})
    os._exit(0)


def _become(request: Mapping[str, Any], files: Sequence[int]) -> None:
    """Run Python's arguments in this process, and end."""
    code = 1
    try:
        os.setpgid(0, 0)  # Ray ends the process group of a worker that ended
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments = [entry for entry in request["arguments"] if entry != "-u"]
        if os.environ.get("PRELOADED_FIRST"):
            exec(os.environ["PRELOADED_FIRST"])
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _connect(path: Path, arguments: list[str]) -> None:
    """Start a process, and end when it ends, with its status."""
    process = _ask(path, arguments, dict(os.environ), (0, 1, 2))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _: process.kill(signum))
    status = process.wait()
    os._exit(128 - status if status is not None and status < 0 else status or 0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]))
    _connect(Path(sys.argv[2]), sys.argv[3:])
