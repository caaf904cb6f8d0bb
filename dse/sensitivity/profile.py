"""The sensitivity profile of a model: measured divergence of tensors and blocks, and the divergence table made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.errors import ProfileError
from dse.files import write_json
from dse.sensitivity.profile_file import MALFORMED, not_a_profile, read_profile_file
from dse.sensitivity.sensitivity_table import SensitivityTable, TableOrigin

__all__ = ["PROFILE_SCHEMA", "MeasuredPart", "SensitivityProfile"]

PROFILE_SCHEMA = 1


@dataclass(frozen=True)
class MeasuredPart:
    """One tensor or block, treated alone.

    Attributes:
        name: Of the tensor or block.
        layer: 0-based index.
        role: Of the tensor; attention or mlp for a block.
        method: Decomposition method, or `removed`.
        parameter_ratio: Share of its parameters that was kept.
        divergence: KL divergence to dense, nats per token.
        standard_error: Of the divergence, over windows of the text.
        log_likelihood_drop: Dense minus treated, nats per token.
    """

    name: str
    layer: int
    role: str
    method: str
    parameter_ratio: float
    divergence: float
    standard_error: float
    log_likelihood_drop: float


@dataclass(frozen=True)
class SensitivityProfile:
    """What was measured, and the table that allocations are made from.

    Attributes:
        model: As the caller named it.
        architecture: Class of the model.
        text: What divergence was measured on, in words.
        parts: Tensors, then blocks, in order of layers.
        table: Options of every block; divergences between measurements are interpolated.
    """

    model: str
    architecture: str
    text: str
    parts: tuple[MeasuredPart, ...]
    table: SensitivityTable

    @property
    def origin(self) -> TableOrigin:
        """What it was measured on."""
        return self.table.origin

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "profile_schema": PROFILE_SCHEMA,
            "model": self.model,
            "architecture": self.architecture,
            "text": self.text,
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "table": self.table.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = "the profile") -> SensitivityProfile:
        """Read what `to_json` wrote.

        Raises:
            ProfileError: It was not written by it, or by another version.
        """
        try:
            if document["profile_schema"] != PROFILE_SCHEMA:
                raise ValueError(f"schema {document['profile_schema']}")
            return cls(
                str(document["model"]),
                str(document["architecture"]),
                str(document["text"]),
                tuple(MeasuredPart(**part) for part in document["parts"]),
                SensitivityTable.from_json(document["table"], where),
            )
        except ProfileError:
            raise
        except MALFORMED as error:
            raise not_a_profile(where, error) from error

    def write(self, path: Path) -> None:
        """Write the profile as JSON, atomically.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path, origin: TableOrigin | None = None) -> SensitivityProfile:
        """Read a profile, and refuse one of another origin where one is asked for.

        Raises:
            ProfileError: The file cannot be read, is damaged, or was measured on something else.
        """
        profile = cls.from_json(read_profile_file(path), str(path))
        if origin is not None:
            profile.origin.check(origin, str(path))
        return profile
