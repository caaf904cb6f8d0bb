"""An engine that runs in a worker process: its name, packages and backend file say everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from dse.engines.engine import Engine, EngineSession, EngineSettings
from dse.engines.worker_session import WorkerSession

__all__ = ["WorkerEngine"]


class WorkerEngine(Engine):
    """Starts a `WorkerSession` with the engine's backend.

    Attributes:
        backend: Name of the backend file beside `worker.py`, without suffix.
    """

    backend: ClassVar[str]

    def environment(self, settings: EngineSettings) -> Mapping[str, str]:
        """Environment variables of the worker."""
        return {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}

    def start(self, folder: Path, settings: EngineSettings) -> EngineSession:  # noqa: D102 - inherited
        self.check_available(settings.python)
        python = self.interpreter(settings.python)
        return WorkerSession(self.name, self.backend, python, folder, settings, self.environment(settings))
