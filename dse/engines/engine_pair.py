"""Two sessions of one engine on one device: the dense model, which stays up, and a design point, started on demand."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dse.decomposition.factors import LowRankFactors
from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint, TensorChoice
from dse.engines.engine import Engine, EngineSession, EngineSettings, FolderWriter
from dse.errors import EngineError, EngineUnavailableError, OutOfMemoryError, StorageFullError, UserError
from dse.models import LoadedModel

__all__ = ["EnginePair"]


class EnginePair:
    """Runs a model in an engine, dense and at design points.

    The dense model's session stays up until `close`; if it has died, it is started again. Folders are temporary.

    Args:
        engine: The engine.
        settings: Interpreter, options, device and time limit; each session gets its share of the device.
        loaded: The model, dense whenever a method is called.
        write_folder: Writes the model at a point as a folder for the engine.
        source: Source of the points' factors; None as long as only the dense model is run.
    """

    def __init__(
        self,
        engine: Engine,
        settings: EngineSettings,
        loaded: LoadedModel,
        write_folder: FolderWriter,
        source: FactorSource | None = None,
    ) -> None:
        self.engine = engine
        self._settings = engine.shared(settings)
        self._loaded = loaded
        self._write_folder = write_folder
        self.source = source
        self._baseline: EngineSession | None = None
        self._folders = contextlib.ExitStack()

    def start(self) -> None:
        """Start the dense model's session before the first trial.

        Raises:
            EngineUnavailableError: The engine is not installed, cannot load the dense model, died or hung.
        """
        self.engine.check_available(self._settings.python)
        try:
            self.baseline()
        except (EngineError, OutOfMemoryError) as error:
            raise EngineUnavailableError(f"the dense model must run in the engine, but {error}") from error

    def baseline(self) -> EngineSession:
        """The dense model's session.

        Raises:
            EngineError: The engine cannot load the dense model, died or exceeded its time limit.
        """
        if self._baseline is None or not self._baseline.is_alive:
            self.close()
            folder = Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix="dse-engine-")))
            self._baseline = self._session(DesignPoint.dense(), folder / "dense")
        return self._baseline

    @contextlib.contextmanager
    def candidate(self, point: DesignPoint) -> Iterator[EngineSession | None]:
        """A session of a design point for the duration of a `with` block; None for the dense model.

        Raises:
            EngineError: The engine cannot take the point, died or exceeded its time limit.
        """
        if point.is_dense:
            yield None
            return
        with (
            tempfile.TemporaryDirectory(prefix="dse-engine-") as folder,
            self._session(point, Path(folder) / "point") as session,
        ):
            yield session

    def close(self) -> None:
        """End the dense model's session and remove its folder."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None
        self._folders.close()

    def _session(self, point: DesignPoint, folder: Path) -> EngineSession:
        try:
            source = _NoFactors() if self.source is None else self.source
            self._write_folder(self._loaded, point, source, folder, self.engine.format)
        except StorageFullError:
            raise
        except UserError as error:  # of this point only: the study goes on
            raise EngineError(f"engine '{self.engine.name}' cannot take this point: {error}") from error
        return self.engine.start(folder, self._settings)


class _NoFactors:
    """The source of the dense model's factors: it has none."""

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        raise ValueError(f"the dense model has no factors, but '{name}' was asked for")
