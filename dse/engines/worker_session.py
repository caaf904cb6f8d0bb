"""Drive an engine's worker process: start it, call it, notice death and hangs, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from dse.engines.engine import EngineSession, EngineSettings, EngineWindow, EngineWork
from dse.errors import EngineError, EngineUnavailableError, OutOfMemoryError

__all__ = ["WorkerSession"]

_HERE = Path(__file__).parent
_CLOSE_TIME_LIMIT_S = 10.0
_TAIL_CHARACTERS = 300


class WorkerSession(EngineSession):
    """One model in a worker process.

    The worker is the leader of a process group of its own, which is killed as a whole: on `close`, on a hang, after an
    interrupt, and, by the worker itself, when this process dies.

    Args:
        engine: Name of the engine, for messages.
        backend: Name of the backend file beside `worker.py`, without suffix.
        python: The engine's interpreter.
        folder: The model's folder.
        settings: Device, dtype, options and time limit.
        environment: Further environment variables of the worker.

    Raises:
        EngineUnavailableError: The interpreter does not exist.
        EngineError: The engine cannot load the folder, died, or exceeded its time limit.
        OutOfMemoryError: It ran out of memory.
    """

    def __init__(
        self,
        engine: str,
        backend: str,
        python: str,
        folder: Path,
        settings: EngineSettings,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self._time_limit_s = settings.time_limit_s
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the session
        self._unread = b""
        begin_s = time.monotonic()
        self._process = self._started(python, backend, environment or {})
        # Runs once, by `_kill` or with the last reference to a session that nobody closes.
        self._end_group = weakref.finalize(self, _kill_group, self._process)
        try:
            options = {"device": settings.device, "dtype": settings.dtype, "threads": settings.threads}
            self._call("load", folder=str(folder), options={**options, **settings.options})
            self.versions = self._call("versions")
        except BaseException:
            self._kill()
            raise
        self.start_up_s = time.monotonic() - begin_s

    @property
    def process_id(self) -> int:
        """Id of the worker, which leads the process group of the engine."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:  # noqa: D102 - inherited
        return self._process.poll() is None

    def run(self, work: EngineWork) -> EngineWindow:  # noqa: D102 - inherited
        window = EngineWindow.from_json(self._call("run", work=asdict(work)))
        if window.output_tokens != work.output_tokens or len(window.ttft_s) != work.requests:
            raise EngineError(
                f"engine '{self.engine}' must generate {work.output_tokens} tokens for {work.requests} requests, but"
                f" generated {window.output_tokens} for {len(window.ttft_s)}"
            )
        return window

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:  # noqa: D102
        found: list[list[int]] = self._call("greedy", prompts=[list(p) for p in prompts], new_tokens=new_tokens)
        return found

    def log_probabilities(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:  # noqa: D102
        found: list[list[float]] = self._call("log_probabilities", prompts=[list(p) for p in prompts])
        return found

    def time_products(self, shapes: Sequence[tuple[int, int, int]], footprint_bytes: int) -> list[float]:  # noqa: D102
        found: list[float] = self._call(
            "time_products", shapes=[list(shape) for shape in shapes], footprint_bytes=footprint_bytes
        )
        return found

    def close(self) -> None:  # noqa: D102
        if self._process.poll() is None:
            self._time_limit_s = _CLOSE_TIME_LIMIT_S
            with contextlib.suppress(EngineError, OutOfMemoryError):
                self._call("close")
        self._kill()

    def _started(self, python: str, backend: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        quiet = {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            return subprocess.Popen(
                [str(Path(python).expanduser()), str(_HERE / "worker.py"), backend],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**inherited, **quiet, **environment},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise EngineUnavailableError(
                f"engine '{self.engine}' needs a Python interpreter, but {python} cannot run"
                f" ({error.strerror or error}); name another with `measurement.python`"
            ) from error

    def _call(self, name: str, **arguments: Any) -> Any:
        """Send one call and wait for its answer."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        request = json.dumps({"call": name, "arguments": arguments}) + "\n"
        try:
            self._process.stdin.write(request.encode())
        except (OSError, ValueError):  # its end of the pipe is closed, or ours
            raise self._died(name) from None
        try:
            line = self._next_line(name)
        except BaseException:  # a hang, or an interrupt: the pipe would hold an answer that nobody waits for
            self._kill()
            raise
        answer = json.loads(line)
        if "result" in answer:
            return answer["result"]
        if answer["kind"] == "memory":
            raise OutOfMemoryError(
                f"engine '{self.engine}' must have room for this model, but: {answer['error'][:500]}"
            )
        raise EngineError(f"engine '{self.engine}' failed in `{name}`: {answer['error'][:500]}")

    def _next_line(self, name: str) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        deadline_s = time.monotonic() + self._time_limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise EngineError(
                        f"engine '{self.engine}' must answer `{name}` within {self._time_limit_s:g} s, but did not and"
                        f" was killed{self._tail()}"
                    )
                received = os.read(self._process.stdout.fileno(), 1 << 20)
                if not received:
                    raise self._died(name)
                self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _died(self, name: str) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        code = self._process.returncode
        how = "closed its pipe"
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return EngineError(f"engine '{self.engine}' must answer `{name}`, but its process {how}{self._tail()}")

    def _tail(self) -> str:
        """The end of the engine's stderr, on one line."""
        if self._errors.closed:
            return ""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 8192))
        text = " ".join(self._errors.read().decode(errors="replace").split())
        return f"; it last wrote: {text[-_TAIL_CHARACTERS:]}" if text else ""

    def _kill(self) -> None:
        """End the process group, and wait for the worker."""
        self._end_group()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a worker and every process of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
