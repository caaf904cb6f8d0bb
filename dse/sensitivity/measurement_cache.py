"""Measured divergences on disk, so that an interrupted profile resumes where it stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import filelock

from dse.design_point import DesignPoint
from dse.files import disk_errors, write_json
from dse.sensitivity.divergence_meter import OptionDivergence
from dse.sensitivity.sensitivity_table import TableOrigin

__all__ = ["MeasurementCache"]

logger = logging.getLogger("dse")

_SCHEMA_VERSION = 1
_ENTRIES, _OLD_ENTRIES = "divergences", "damages"


class MeasurementCache:
    """Divergence by point for one `origin` (model, calibration, methods, text, dtype), in one file.

    The file is written as a whole and replaced atomically, so that a kill at any moment leaves the last saved state.
    """

    def __init__(self, path: Path, origin: TableOrigin) -> None:
        """Read the file; one that is malformed or has another origin counts as empty."""
        self._path = path
        self.origin = origin
        self._entries = self._read()
        self._unsaved = False

    def get(self, point: DesignPoint) -> OptionDivergence | None:
        """The measured divergence of a point; None if not measured."""
        return self._entries.get(point.canonical_json)

    @property
    def entries(self) -> dict[str, OptionDivergence]:
        """All measured divergences by the canonical JSON of their points."""
        return dict(self._entries)

    def add(self, known: Mapping[str, OptionDivergence]) -> None:
        """Add measurements of other processes."""
        self._entries |= known
        self._unsaved = self._unsaved or bool(known)

    def put(self, point: DesignPoint, divergence: OptionDivergence) -> None:
        """Add a measurement; `save` writes it to disk."""
        self._entries[point.canonical_json] = divergence
        self._unsaved = True

    def save(self) -> None:
        """Write the file if there are new measurements; those that other processes wrote meanwhile are kept.

        Raises:
            StorageFullError: The disk is full or the folder is not writable.
        """
        if not self._unsaved:
            return
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._path.with_suffix(".lock"))
            with lock:
                self._write()
        self._unsaved = False

    def _write(self) -> None:
        self._entries = self._read() | self._entries
        document = {
            "schema": _SCHEMA_VERSION,
            "fingerprint": self.origin.fingerprint,
            "origin": dataclasses.asdict(self.origin),
            _ENTRIES: {key: list(dataclasses.astuple(entry)) for key, entry in self._entries.items()},
        }
        write_json(self._path, document)

    def _read(self) -> dict[str, OptionDivergence]:
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            if document["schema"] != _SCHEMA_VERSION or document["fingerprint"] != self.origin.fingerprint:
                return {}
            entries = document[_ENTRIES if _ENTRIES in document else _OLD_ENTRIES]
            return {str(key): OptionDivergence(*map(float, values)) for key, values in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("sensitivity: %s is malformed; its points are measured again", self._path)
            return {}
