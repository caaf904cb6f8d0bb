"""The sensitivity profile of a model: measured divergences of tensors and blocks, and the table built from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.errors import DseError, ProfileError
from dse.files import write_json
from dse.sensitivity.sensitivity_table import SensitivityTable, TableOrigin

__all__ = ["PROFILE_SCHEMA", "MeasuredPart", "SensitivityProfile"]

PROFILE_SCHEMA = 1

_OLD_PART_KEYS = {"damage": "divergence", "kept_fraction": "parameter_ratio"}
"""Keys of earlier versions to the attributes of a `MeasuredPart`."""


@dataclass(frozen=True)
class MeasuredPart:
    """One tensor, stack or block, changed alone.

    Attributes:
        name: Name of the tensor, stack or block.
        layer: 0-based index.
        role: Role of the tensor or stack; attention or mlp for a block.
        method: Decomposition method, or `removed`.
        parameter_ratio: Factor parameters / dense parameters of the part.
        divergence: KL divergence from the dense model, nats per token.
        standard_error: Standard error of the divergence over windows of the text.
        log_likelihood_drop: Log-likelihood of the text, dense minus changed, nats per token.
    """

    name: str
    layer: int
    role: str
    method: str
    parameter_ratio: float
    divergence: float
    standard_error: float
    log_likelihood_drop: float

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MeasuredPart:
        """Read a part of a profile file, in the keys of this version or an earlier one.

        Raises:
            TypeError, AttributeError: A key is missing or unknown.
        """
        return cls(**{_OLD_PART_KEYS.get(key, key): value for key, value in entry.items()})


@dataclass(frozen=True)
class SensitivityProfile:
    """The measurements, and the sensitivity table that allocations use.

    Attributes:
        model: The model as named by the caller.
        architecture: Class of the model.
        text: Description of the text on which the divergence was measured.
        parts: Tensors, then blocks, in the order of the layers.
        table: Options of every block; divergences between measurements are interpolated.
    """

    model: str
    architecture: str
    text: str
    parts: tuple[MeasuredPart, ...]
    table: SensitivityTable

    @property
    def origin(self) -> TableOrigin:
        """What the profile was measured on."""
        return self.table.origin

    def to_json(self) -> dict[str, Any]:
        """The whole profile as JSON values."""
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
        """Read the output of `to_json`.

        Raises:
            ProfileError: The document is not the output of `to_json`, or has another schema version.
        """
        try:
            if document["profile_schema"] != PROFILE_SCHEMA:
                raise ValueError(f"schema {document['profile_schema']}")
            return cls(
                str(document["model"]),
                str(document["architecture"]),
                str(document["text"]),
                tuple(map(MeasuredPart.from_json, document["parts"])),
                SensitivityTable.from_json(document["table"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, DseError) as error:
            raise ProfileError(
                f"a sensitivity profile must be a file written by `dse sensitivity`, but {where} is not"
                f" ({type(error).__name__}: {error}); measure the profile again"
            ) from error

    def write(self, path: Path) -> None:
        """Write the profile as JSON, atomically.

        Raises:
            StorageFullError: The disk is full or the folder is not writable.
        """
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path, origin: TableOrigin | None = None) -> SensitivityProfile:
        """Read a profile, and check its origin if one is given.

        Raises:
            ProfileError: The file is not readable, is malformed, or has another origin.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ProfileError(
                f"a sensitivity profile must be a readable JSON file, but {path} is not"
                f" ({getattr(error, 'strerror', None) or error}); measure it with `dse sensitivity`"
            ) from error
        profile = cls.from_json(document, str(path))
        if origin is not None:
            profile.origin.check(origin, str(path))
        return profile
