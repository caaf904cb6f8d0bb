"""Measured divergences on disk: what a killed profile had measured is not measured again."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dse.design_point import DesignPoint
from dse.files import write_json
from dse.sensitivity.divergence_meter import OptionDivergence
from dse.sensitivity.sensitivity_table import TableOrigin

__all__ = ["MeasurementCache"]

logger = logging.getLogger("dse")

_SCHEMA_VERSION = 1


class MeasurementCache:
    """Damage by point, of one origin (model, calibration, methods, text, dtype), in one file.

    Written as a whole and replaced atomically, so a kill at any moment leaves what was saved last.
    """

    def __init__(self, path: Path, origin: TableOrigin) -> None:
        """Read what is there; a damaged file, or one of another origin, is measured anew."""
        self._path = path
        self._origin = origin
        self._entries = self._read()
        self._unsaved = False

    def get(self, point: DesignPoint) -> OptionDivergence | None:
        """What was measured of this point, if it was."""
        return self._entries.get(point.canonical_json)

    def put(self, point: DesignPoint, divergence: OptionDivergence) -> None:
        """Keep a measurement, in memory until `save`."""
        self._entries[point.canonical_json] = divergence
        self._unsaved = True

    def save(self) -> None:
        """Write the file, if there is something new.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        if self._unsaved:
            write_json(self._path, {"schema": _SCHEMA_VERSION, **dict(self._header()), "divergences": self._rows()})
            self._unsaved = False

    def __len__(self) -> int:
        return len(self._entries)

    def _header(self) -> Iterator[tuple[str, Any]]:
        yield "fingerprint", self._origin.fingerprint
        yield "origin", dataclasses.asdict(self._origin)

    def _rows(self) -> dict[str, list[float]]:
        return {key: list(dataclasses.astuple(divergence)) for key, divergence in self._entries.items()}

    def _read(self) -> dict[str, OptionDivergence]:
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            if document["schema"] != _SCHEMA_VERSION or document["fingerprint"] != self._origin.fingerprint:
                return {}
            return {str(key): OptionDivergence(*map(float, values)) for key, values in document["divergences"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("sensitivity: %s is damaged; its points will be measured again", self._path)
            return {}
