"""A worker process: it holds the resident model, the factor bank and the evaluator, and runs the driver's jobs."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse import __version__
from dse.config import StudyConfig
from dse.errors import StudyError
from dse.evaluation import EvaluationCache
from dse.files import cache_dir
from dse.sensitivity.divergence_meter import OptionDivergence
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.study.jobs import EvaluateTrial, Job, MeasureIdle
from dse.study.listener import StudyListener
from dse.study.outline import StudyOutline
from dse.study.setup import PreparedStudy, prepare_study

__all__ = ["CacheFolder", "JobOutcome", "PhaseBoard", "StudyRequest", "StudyWorker", "WorkerFacts"]

_PHASE_PERIOD_S = 0.5


@dataclass(frozen=True)
class CacheFolder:
    """The driver's cache folder.

    Attributes:
        path: Where it is on the driver's machine.
        token: Name of an empty file in it, by which a worker recognises the same folder.
    """

    path: Path
    token: str


@dataclass(frozen=True)
class StudyRequest:
    """What a worker prepares.

    Attributes:
        config: The study.
        started_with: Objectives of the existing trials; None for a new study.
        answers: Folder of answers if the user's cache is not used; None if it is.
        idle: Whether to measure the idle power of the worker's device.
    """

    config: StudyConfig
    started_with: tuple[str, ...] | None
    answers: Path | None
    idle: bool = False


@dataclass(frozen=True)
class WorkerFacts:
    """What must agree among workers, and who they are.

    Attributes:
        versions: Package to version, of Python, dse, torch and transformers.
        host: Name of the machine.
        pid: The process.
        device: The kind of device, such as `NVIDIA H200` or the CPU's name.
        shares_cache: Whether its cache folder is the driver's.
    """

    versions: Mapping[str, str]
    host: str
    pid: int
    device: str
    shares_cache: bool

    @property
    def name(self) -> str:
        """`host (NVIDIA H200)`."""
        return f"{self.host} ({self.device})"


@dataclass(frozen=True)
class JobOutcome:
    """The result of a job, and what it logged."""

    result: Any
    log: tuple[str, ...] = ()


class PhaseBoard:
    """An actor beside the driver: what each worker is doing."""

    def __init__(self) -> None:
        self._phases: dict[int, tuple[str, int, int]] = {}

    def put(self, worker: int, phase: str, done: int, total: int) -> None:
        """Note the phase of a worker."""
        self._phases[worker] = (phase, done, total)

    def read(self) -> dict[int, tuple[str, int, int]]:
        """Worker to its phase, steps done and steps in all."""
        return dict(self._phases)


class StudyWorker:
    """The actor. Its methods are called one at a time."""

    def __init__(self, index: int, threads: int, cache: CacheFolder, board: Any) -> None:
        import torch

        self._index = index
        self._listener = _BoardListener(index, board)
        self._prepared: PreparedStudy | None = None
        self._request: StudyRequest | None = None
        self._idle: Any = None
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        if "DSE_CACHE" not in os.environ and (cache.path / cache.token).is_file():
            os.environ["DSE_CACHE"] = str(cache.path)
        self._shares_cache = (cache_dir() / cache.token).is_file()

    def describe(self) -> WorkerFacts:
        """Versions, machine and device."""
        import torch
        import transformers

        is_gpu = torch.cuda.is_available()
        return WorkerFacts(
            {
                "Python": platform.python_version(),
                "dse": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name(0) if is_gpu else platform.processor() or platform.machine(),
            shares_cache=self._shares_cache,
        )

    def prepare(self, request: StudyRequest, table: SensitivityTable | None = None) -> tuple[StudyOutline, list[str]]:
        """Load the model and open the factor bank, or build it; at once if that is done.

        Returns:
            The outline, without sensitivity table unless one is given, and messages for the user.
        """
        self._listener.messages.clear()
        if self._prepared is None or self._request is None or self._request.config != request.config:
            config = _on_this_device(request.config)
            folder = cache_dir() / "evaluations" if request.answers is None else _usable(request.answers)
            self._prepared = prepare_study(
                config, self._listener, request.started_with, EvaluationCache(folder), with_table=False
            )
        self._request = request
        if request.idle and self._idle is None:
            self._idle = MeasureIdle().run(self._prepared, self._listener)
        self._prepared = dataclasses.replace(self._prepared, table=table)
        return StudyOutline.of(self._prepared), list(self._listener.messages)

    def measure_share(self, index: int, count: int) -> dict[str, OptionDivergence]:
        """Measure this worker's share of the sensitivity profile; known divergences are not measured again.

        Returns:
            Point to divergence, of all measurements that this machine knows.
        """
        from dse.search.space_sensitivity import measure_table_share

        prepared = self._ready()
        return measure_table_share(
            prepared.config,
            prepared.loaded,
            prepared.space,
            prepared.evaluator.bank,
            prepared.calibration,
            share=(index, count),
            progress=self._listener.on_phase,
        )

    def table(self, known: Mapping[str, OptionDivergence]) -> tuple[SensitivityTable | None, list[str]]:
        """The sensitivity table, from divergences that the workers measured."""
        from dse.search.space_sensitivity import study_table

        prepared = self._ready()
        self._listener.messages.clear()
        table = study_table(
            prepared.config,
            prepared.loaded,
            prepared.space,
            prepared.evaluator.bank,
            prepared.calibration,
            progress=self._listener.on_phase,
            notify=self._listener.on_message,
            known=known,
        )
        return table, list(self._listener.messages)

    def run(self, job: Job) -> JobOutcome:
        """Run a job on the resident model; a device that is lost ends the process, and Ray starts another."""
        prepared = self._ready()
        if isinstance(job, EvaluateTrial):
            job = dataclasses.replace(job, idle=self._idle)
        with _captured_log() as lines:
            result = job.run(prepared, self._listener)
        if getattr(getattr(result, "record", None), "state", "") == "failed":
            try:
                prepared.evaluator.check_device()
            except StudyError:
                os._exit(1)
        return JobOutcome(result, tuple(lines))

    def inventory(self) -> dict[str, tuple[int, str]]:
        """File of the factor bank and the profile to its size and SHA-256, as paths relative to the cache folder."""
        prepared = self._ready()
        folders = [*prepared.evaluator.bank.folders.values()]
        files = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*"))]
        root = cache_dir()
        return {
            str(path.relative_to(root)): (path.stat().st_size, _digest(path))
            for path in files
            if path.is_file() and not path.name.startswith(".")
        }

    def missing(self, inventory: Mapping[str, tuple[int, str]]) -> list[str]:
        """Files of another machine's inventory that are absent or different here."""
        found = []
        for name, (size, digest) in inventory.items():
            path = cache_dir() / name
            if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
                found.append(name)
        return found

    def send(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file of the cache folder."""
        with (cache_dir() / name).open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def receive(self, name: str, offset: int, content: bytes) -> None:
        """Append a part to a file that arrives."""
        path = _arriving(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if offset else "wb") as stream:
            stream.seek(offset)
            stream.write(content)

    def accept(self, name: str, digest: str) -> None:
        """Move a file that has arrived to its place.

        Raises:
            StudyError: Its checksum is not the expected one.
        """
        path = _arriving(name)
        if _digest(path) != digest:
            path.unlink(missing_ok=True)
            raise StudyError(f"{name} must arrive unchanged at {socket.gethostname()}, but its checksum differs")
        path.replace(cache_dir() / name)

    def _ready(self) -> PreparedStudy:
        if self._prepared is None:
            raise StudyError("a worker must be prepared before it runs a job")
        return self._prepared


class _BoardListener(StudyListener):
    """Keeps messages, and reports phases to the board."""

    def __init__(self, index: int, board: Any) -> None:
        self.messages: list[str] = []
        self._index, self._board = index, board
        self._phase, self._told_s = "", 0.0

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase == self._phase and now - self._told_s < _PHASE_PERIOD_S:
            return
        self._phase, self._told_s = phase, now
        self._board.put.remote(self._index, phase, done, total)


class _captured_log(logging.Handler):  # noqa: N801 - used as a context manager
    """What `dse` logs inside a block, as lines for the driver's log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def __enter__(self) -> list[str]:
        logger = logging.getLogger("dse")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("dse").removeHandler(self)


def _on_this_device(config: StudyConfig) -> StudyConfig:
    """Ray shows a worker only its own GPUs, so that its first one is `cuda:0`."""
    if not config.model.device.startswith("cuda"):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"device": "cuda:0"})})


def _usable(answers: Path) -> Path:
    """The folder of answers in the study's folder or, on a machine without that, one of this process."""
    return answers if answers.parent.is_dir() else Path(tempfile.mkdtemp(prefix="dse-answers-"))


def _arriving(name: str) -> Path:
    path = cache_dir() / name
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
