"""The folder of a study: its files, which study it belongs to, and a lock against a second process."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from dse.config import StudyConfig, parse_study
from dse.errors import StudyError
from dse.evaluation import EvaluationResult, read_graded, read_outcomes
from dse.files import disk_errors, write_json, write_text
from dse.report.worker_lanes import LANES_FILE
from dse.study.storage_place import DatabasePlace, database_of, enter_database
from dse.workers.device_defaults import with_stored_defaults
from dse.yaml_reading import read_yaml

__all__ = ["StudyFolder"]

_LOCK = ".lock"


class StudyFolder:
    """`study.yaml`, `study.db`, `trials.csv`, `front.csv`, `front.html`, `front.png`, `run.log`, `outcomes/`.

    `workers.json` tells the live page what the workers do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_yaml = path / "study.yaml"
        self.storage_file = path / "study.db"
        self.storage_pointer = path / "storage.json"
        self.trials_csv = path / "trials.csv"
        self.front_csv = path / "front.csv"
        self.front_html = path / "front.html"
        self.front_png = path / "front.png"
        self.log = path / "run.log"
        self.workers = path / LANES_FILE
        self.answers = path / "answers"

    @property
    def storage(self) -> Path | DatabasePlace:
        """Where the study is stored: its SQLite file, unless the folder names a database."""
        return database_of(self.storage_pointer) or self.storage_file

    def choose_storage(self, config: StudyConfig) -> None:
        """Note the database that a study file names.

        Raises:
            ConfigError: The folder's study is stored elsewhere.
        """
        if config.storage is not None:
            enter_database(self.storage_pointer, self.storage_file, config.storage, config.name)

    def outcomes(self, trial: int) -> Path:
        """The file of one trial's per-document outcomes."""
        return self.path / "outcomes" / f"trial-{trial:05d}.npz"

    def drop_answers(self) -> None:
        """Remove answers that were kept for resuming only."""
        shutil.rmtree(self.answers, ignore_errors=True)

    def check_usable(self) -> None:
        """Refuse a folder that is neither empty nor a study's; nothing is written.

        Raises:
            StudyError: The folder holds something other than a study.
        """
        try:
            has_study = self.study_yaml.exists()
            # A kill before the first trial leaves a few files, one of them possibly half-written.
            is_empty = not self.path.exists() or (self.path.is_dir() and all(map(_is_ours, self.path.iterdir())))
        except OSError as error:
            raise StudyError(
                f"a study needs a folder it can use, but {self.path}: {error.strerror}; choose another `--out`"
            ) from error
        if not (has_study or is_empty):
            raise StudyError(
                f"a study needs a folder of its own, but {self.path} exists and is not a study; choose another `--out`"
            )

    def check_same(self, config: StudyConfig, evaluated_trials: int) -> None:
        """Refuse to mix two studies; a study without evaluated trials is replaced.

        Between runs the number of trials may change, and points may be added to `enqueue`.

        Raises:
            StudyError: The folder holds trials of another study.
        """
        if not self.study_yaml.exists():
            return
        earlier = self.read_config()
        before, now = _identity(earlier), _identity(config)
        if all(point in config.enqueue for point in earlier.enqueue):
            del before["enqueue"], now["enqueue"]
        different = [key for key in now if before[key] != now[key]]
        if evaluated_trials and self._was_fast(read_yaml(self.study_yaml)):
            raise StudyError(
                f"{self.path} holds latencies of mode `fast`, which was removed, so new trials would not compare;"
                " choose another `--out`"
            )
        if different and evaluated_trials:
            raise StudyError(
                f"{self.path} holds another study (different: {', '.join(different)}); choose another `--out`, or"
                " give this study another name"
            )
        if different:
            with disk_errors(self.path):
                self.storage.unlink(missing_ok=True)

    def with_settled_multiple(self, config: StudyConfig) -> StudyConfig:
        """The study with the rank multiple, dtype and mode found when it started, where it leaves them to the device.

        Timings may have changed since then, but the space of a study must not.

        Raises:
            StudyError: The folder's study is damaged.
        """
        if not self.study_yaml.exists():
            return config
        config = with_stored_defaults(config, self.read_config())
        if config.space.ranks.multiple != "device":
            return config
        settled = self.read_config().space.ranks.multiple
        return config if settled == "device" else config.model_copy(update={"space": config.space.at_multiple(settled)})

    def write_config(self, config: StudyConfig) -> None:
        """Write the resolved study.

        Raises:
            StorageFullError: The folder cannot be written.
        """
        write_text(self.study_yaml, config.to_yaml())

    def write_evaluation(self, trial: int, evaluation: EvaluationResult) -> None:
        """Store an evaluation with its per-document outcomes."""
        evaluation.write_outcomes(self.outcomes(trial))
        write_json(self.outcomes(trial).with_suffix(".json"), evaluation.to_json())

    def read_evaluation(self, trial: int) -> EvaluationResult:
        """Read the evaluation of a trial.

        Raises:
            StudyError: The evaluation is missing or damaged.
        """
        path = self.outcomes(trial).with_suffix(".json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StudyError(f"{path} must hold the evaluation of trial {trial}, but is missing or damaged") from error
        stored = self.outcomes(trial)
        return EvaluationResult.from_json(data, read_outcomes(stored), read_graded(stored))

    @contextlib.contextmanager
    def logging_to_file(self) -> Iterator[None]:
        """Write the log of `dse` to `run.log`, too."""
        logger = logging.getLogger("dse")
        with disk_errors(self.log):
            handler = _LogFile(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            with contextlib.suppress(OSError):
                handler.close()

    def read_config(self) -> StudyConfig:
        """Read the resolved study of this folder.

        Raises:
            StudyError: The folder holds no study.
        """
        if not self.study_yaml.is_file():
            raise StudyError(
                f"{self.path} must be the folder of a study, but has no study.yaml; give the folder that `dse run`"
                " printed"
            )
        content = read_yaml(self.study_yaml)
        if self._was_fast(content):  # a study of version 0.1 can still be opened, but not resumed
            content = {**content, "measurement": {**content["measurement"], "mode": "eager"}}
        return parse_study(content, base=self.path, origin=str(self.study_yaml))

    @staticmethod
    def _was_fast(content: Any) -> bool:
        """Whether a study file asks for mode `fast` of version 0.1."""
        measurement = content.get("measurement") if isinstance(content, dict) else None
        return isinstance(measurement, dict) and measurement.get("mode") == "fast"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, which is created if necessary; the lock ends with the process.

        A new folder to which nothing was written is removed again.

        Raises:
            StudyError: Another process runs this study.
            StorageFullError: The folder cannot be created or written.
        """
        lock = filelock.FileLock(self.path / _LOCK, blocking=False)
        with disk_errors(self.path):
            is_new = not self.path.exists()
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except filelock.Timeout:
                raise StudyError(
                    f"one process at a time may run a study, but another one runs {self.path}; wait for it"
                ) from None
        try:
            yield
        finally:
            if is_new and not self.study_yaml.exists():
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink()
                    self.path.rmdir()
            lock.release()


class _LogFile(logging.FileHandler):
    """A log file whose write errors, as on a full disk, do not hide the error that matters."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignore the error."""


def _is_ours(path: Path) -> bool:
    """Whether a study writes this file before `study.yaml`."""
    written_first = ("storage.json", LANES_FILE)
    return path.name in (_LOCK, "answers", *written_first) or path.name.startswith(
        tuple(f".{name}." for name in ("study.yaml", *written_first))
    )


def _identity(config: StudyConfig) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    del data["budget"], data["workers"], data["storage"]
    del data["measurement"]["python"], data["measurement"]["engine_time_limit_s"]  # an environment may move
    del data["evaluation"]["batch_size"]  # changes rounding alone, and memory may have run out
    return data
