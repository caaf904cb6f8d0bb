"""The divergence table: units, their options, and what it was measured on; JSON in and out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dse.design_point import DesignPoint
from dse.errors import PointError, ProfileError
from dse.files import write_json
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.profile_file import MALFORMED, not_a_profile, read_profile_file

__all__ = ["SCHEMA_VERSION", "SensitivityTable", "TableOrigin"]

SCHEMA_VERSION = 1

Factors = Mapping[str, float] | Callable[[Unit, Option], float]


@dataclass(frozen=True)
class TableOrigin:
    """What a table was measured on; a table of another origin says nothing about this one.

    Attributes:
        model: Fingerprint of the dense model.
        calibration: Fingerprint of the calibration text that factors were made with; "" where no method needs any.
        methods: Decomposition methods, sorted.
        text: Fingerprint of the text on which divergence was measured.
        tokens: Of that text.
        dtype: In which the model was held.
    """

    model: str = ""
    calibration: str = ""
    methods: tuple[str, ...] = ()
    text: str = ""
    tokens: int = 0
    dtype: str = "float32"

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all attributes."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check(self, wanted: TableOrigin, where: str) -> None:
        """Refuse a table that was measured on something else than `wanted`.

        Raises:
            ProfileError: With the first attribute that differs.
        """
        for attribute in dataclasses.fields(self):
            have, want = getattr(self, attribute.name), getattr(wanted, attribute.name)
            if have != want:
                raise ProfileError(
                    f"a sensitivity profile must be of the same {_WHAT[attribute.name]}, but {where} has"
                    f" {_shown(have)} where {_shown(want)} is needed; measure it anew with `dse sensitivity`, or name"
                    " the model, texts and methods that it was measured with"
                )


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value) or "none"


_WHAT = {
    "model": "model (fingerprint)",
    "calibration": "calibration text (fingerprint)",
    "methods": "methods",
    "text": "profile text (fingerprint)",
    "tokens": "number of profile tokens",
    "dtype": "dtype",
}


@dataclass(frozen=True)
class SensitivityTable:
    """Units with their options, and the totals of the dense model.

    Divergences of different units are taken to add up; `scaled` is the place to correct that from measured points.

    Attributes:
        units: In order of layers.
        parameters_dense: All parameters of the dense model, tied ones once.
        origin: What it was measured on.
        latency_dense_s: Latency of the dense model, of which the options' `latency_s` are shares.
        energy_dense_j: Energy of the dense model, of which the options' `energy_j` are shares.
        one_remains: Groups of units of which one at least may not be removed, such as all attention blocks.
    """

    units: tuple[Unit, ...]
    parameters_dense: int
    origin: TableOrigin = field(default=TableOrigin())
    latency_dense_s: float | None = None
    energy_dense_j: float | None = None
    one_remains: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        decided = [name for unit in self.units for name in unit.names]
        if len(set(names)) < len(names) or len(set(decided)) < len(decided):
            raise ProfileError("each unit must stand in a profile once, and each tensor belong to one unit")
        if sum(unit.dense.parameters for unit in self.units) > self.parameters_dense:
            raise ProfileError(
                f"the units of a profile hold at most the model's {self.parameters_dense:,} parameters, but more are"
                " listed; measure the profile anew"
            )

    @cached_property
    def by_name(self) -> Mapping[str, Unit]:
        """Unit name to unit."""
        return {unit.name: unit for unit in self.units}

    def reduction_of(self, parameters: int) -> float:
        """1 - parameters / dense parameters."""
        return 1 - parameters / self.parameters_dense

    def options_of(self, point: DesignPoint) -> dict[str, Option]:
        """Unit name to the option that this point takes, dense ones included.

        Raises:
            PointError: The point holds something that is no option of this table.
        """
        unit_of = {name: unit for unit in self.units for name in unit.names}
        chosen: dict[str, list[Any]] = {}
        for name, choice in point:
            if name not in unit_of:
                raise PointError(
                    f"a point must be made of the profile's options, but none of its {len(self.units)} units treats"
                    f" '{name}'; measure a profile that does"
                )
            chosen.setdefault(unit_of[name].name, []).append((name, choice))
        found = {}
        for unit in self.units:
            choices = tuple(chosen.get(unit.name, ()))
            option = unit.by_choices.get(choices)
            if option is None:
                listed = Option(choices, 0, 0.0).describe()
                raise PointError(
                    f"a point must be made of the profile's options, but '{unit.name}' has none that is {listed}"
                )
            found[unit.name] = option
        return found

    def divergence_of(self, point: DesignPoint) -> float:
        """Sum of the divergences of the point's options, nats per token.

        Raises:
            PointError: The point holds something that is no option of this table.
        """
        return sum(option.divergence for option in self.options_of(point).values())

    def scaled(self, factors: Factors) -> SensitivityTable:
        """The same table with divergences multiplied.

        Args:
            factors: Unit name to factor (1 where a unit is not named), or a function of unit and option.
        """

        def factor(unit: Unit, option: Option) -> float:
            return factors(unit, option) if callable(factors) else factors.get(unit.name, 1.0)

        def scaled_option(unit: Unit, option: Option) -> Option:
            if option.is_dense:  # at 0 whatever the factor
                return option
            return dataclasses.replace(option, divergence=option.divergence * factor(unit, option))

        units = tuple(
            dataclasses.replace(unit, options=tuple(scaled_option(unit, option) for option in unit.options))
            for unit in self.units
        )
        return dataclasses.replace(self, units=units)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "schema": SCHEMA_VERSION,
            "fingerprint": self.origin.fingerprint,
            "origin": dataclasses.asdict(self.origin),
            "parameters_dense": self.parameters_dense,
            "latency_dense_s": self.latency_dense_s,
            "energy_dense_j": self.energy_dense_j,
            "one_remains": [list(group) for group in self.one_remains],
            "units": [
                {
                    "name": unit.name,
                    "layer": unit.layer,
                    "kind": unit.kind,
                    "options": [option.to_json() for option in unit.options],
                }
                for unit in self.units
            ],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = "the profile") -> SensitivityTable:
        """Read what `to_json` wrote.

        Raises:
            ProfileError: It was not written by it, or by another version.
        """
        try:
            if document["schema"] != SCHEMA_VERSION:
                raise ValueError(f"schema {document['schema']}")
            origin = dict(document["origin"])
            units = tuple(
                Unit(
                    str(unit["name"]),
                    None if unit["layer"] is None else int(unit["layer"]),
                    str(unit["kind"]),
                    tuple(Option.from_json(option) for option in unit["options"]),
                )
                for unit in document["units"]
            )
            latency_s, energy_j = document["latency_dense_s"], document["energy_dense_j"]
            return cls(
                units,
                int(document["parameters_dense"]),
                TableOrigin(**{**origin, "methods": tuple(origin["methods"])}),
                None if latency_s is None else float(latency_s),
                None if energy_j is None else float(energy_j),
                tuple(tuple(map(str, group)) for group in document["one_remains"]),
            )
        except MALFORMED as error:
            raise not_a_profile(where, error) from error

    def write(self, path: Path) -> None:
        """Write the table as JSON, atomically.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path, origin: TableOrigin | None = None) -> SensitivityTable:
        """Read a table, and refuse one of another origin where one is asked for.

        Raises:
            ProfileError: The file cannot be read, is damaged, or was measured on something else.
        """
        table = cls.from_json(read_profile_file(path), str(path))
        if origin is not None:
            table.origin.check(origin, str(path))
        return table
