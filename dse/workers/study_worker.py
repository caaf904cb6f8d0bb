"""A worker process: it holds the resident model, the factor bank and the evaluator, and runs the driver's jobs."""

from __future__ import annotations

import dataclasses
import importlib
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

from dse.config import StudyConfig
from dse.errors import StudyError
from dse.evaluation import EvaluationCache
from dse.files import cache_dir
from dse.sensitivity.divergence_meter import OptionDivergence
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.workers.cache_folder import CacheFolder
from dse.workers.driver_desk import bank_files, fetch_missing, hand_in
from dse.workers.jobs import EvaluateTrial, Job, MeasureIdle
from dse.workers.listener import StudyListener
from dse.workers.outline import StudyOutline
from dse.workers.ray_cluster import find_actor
from dse.workers.setup import PreparedStudy, prepare_study

__all__ = ["CacheFolder", "JobOutcome", "Joined", "StudyRequest", "StudyWorker", "WorkerFacts"]

_PHASE_PERIOD_S = 0.5


@dataclass(frozen=True)
class StudyRequest:
    """What a worker prepares.

    Attributes:
        config: The study.
        started_with: Objectives of the existing trials; None for a new study.
        answers: Folder of answers if the user's cache is not used; None if it is.
        threads: Threads on a CPU.
        cache: The driver's cache folder.
        desk: Name of the actor beside the driver.
    """

    config: StudyConfig
    started_with: tuple[str, ...] | None
    answers: Path | None
    threads: int
    cache: CacheFolder
    desk: str


@dataclass(frozen=True)
class WorkerFacts:
    """Who a worker is, and what must agree among workers.

    Attributes:
        versions: Package to version, of Python, dse, torch and transformers.
        host: Name of the machine.
        pid: The process.
        device: The kind of device, such as `NVIDIA H200` or the processor's name.
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
class Joined:
    """A worker that is ready for jobs.

    Attributes:
        facts: Who it is.
        outline: The study as it has prepared it, without a sensitivity table.
        messages: What it has to say to the user.
        files: Folders of the factor bank, relative to the cache folder.
    """

    facts: WorkerFacts
    outline: StudyOutline
    messages: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class JobOutcome:
    """The result of a job, and what was logged meanwhile."""

    result: Any
    log: tuple[str, ...] = ()


class StudyWorker:
    """The actor. Its methods are called one at a time; one that is restarted prepares the study again.

    Args:
        index: Number of the worker.
        request: What it prepares.
    """

    def __init__(self, index: int, request: StudyRequest) -> None:
        import torch

        self._request, self._desk = request, find_actor(request.desk)
        self._listener = _DeskListener(index, self._desk)
        self._prepared: PreparedStudy | None = None
        self._idle: Any = None
        if not torch.cuda.is_available():
            torch.set_num_threads(request.threads)
        cache = request.cache
        if (cache.is_named or "DSE_CACHE" not in os.environ) and (cache.path / cache.token).is_file():
            os.environ["DSE_CACHE"] = str(cache.path)
        self._shares_cache = (cache_dir() / cache.token).is_file()

    def ping(self) -> None:
        """Answer."""

    def describe(self) -> WorkerFacts:
        """Versions, machine and device."""
        import torch
        import transformers

        is_gpu = torch.cuda.is_available()
        return WorkerFacts(
            {
                "Python": platform.python_version(),
                "dse": importlib.import_module("dse").__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name(0) if is_gpu else platform.processor() or platform.machine(),
            shares_cache=self._shares_cache,
        )

    def join(self) -> Joined:
        """Load the model, and open the factor bank or build it; at once if that is done."""
        prepared = self._ready()
        root = cache_dir()
        folders = tuple(str(folder.relative_to(root)) for folder in prepared.evaluator.bank.folders.values())
        return Joined(self.describe(), StudyOutline.of(prepared), tuple(self._listener.messages), folders)

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
        """The sensitivity table from divergences that the workers measured, and messages for the user."""
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
        """Run a job on the resident model. If the device is lost, the process ends, and Ray starts another."""
        prepared = self._ready()
        if isinstance(job, EvaluateTrial):
            job = dataclasses.replace(job, idle=self._idle)
        with _CapturedLog() as lines:
            result = job.run(prepared, self._listener)
        if getattr(getattr(result, "record", None), "state", "") == "failed":
            try:
                prepared.evaluator.check_device()
            except StudyError:
                os._exit(1)
        return JobOutcome(result, tuple(lines))

    def _ready(self) -> PreparedStudy:
        if self._prepared is not None:
            return self._prepared
        if not self._shares_cache:
            fetch_missing(self._desk)
        request = self._request
        folder = cache_dir() / "evaluations" if request.answers is None else _usable(request.answers)
        prepared = prepare_study(
            _on_this_device(request.config),
            self._listener,
            request.started_with,
            EvaluationCache(folder),
            with_table=False,
        )
        if not self._shares_cache:
            hand_in(self._desk, bank_files(prepared.evaluator.bank.folders.values()))
        self._idle = MeasureIdle().run(prepared, self._listener)
        self._prepared = prepared
        return prepared


class _DeskListener(StudyListener):
    """Keeps messages, and reports phases to the desk."""

    def __init__(self, index: int, desk: Any) -> None:
        self.messages: list[str] = []
        self._index, self._desk = index, desk
        self._phase, self._told_s = "", 0.0

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase == self._phase and now - self._told_s < _PHASE_PERIOD_S:
            return
        self._phase, self._told_s = phase, now
        self._desk.note.remote(self._index, phase, done, total)


class _CapturedLog(logging.Handler):
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
