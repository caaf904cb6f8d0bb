"""The sensitivity table: units, their options with the divergence of each, and the origin of the measurements."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dse.design_point import DesignPoint
from dse.errors import PointError, ProfileError
from dse.sensitivity.option import Option, Unit

__all__ = ["SCHEMA_VERSION", "SensitivityTable", "TableOrigin"]

SCHEMA_VERSION = 1

Factors = Mapping[str, float] | Callable[[Unit, Option], float]


@dataclass(frozen=True)
class TableOrigin:
    """What a table was measured on. Tables of different origins are not comparable.

    Attributes:
        model: Fingerprint of the dense model.
        calibration: Fingerprint of the calibration text of the factors; "" if no method needs calibration.
        methods: Decomposition methods, sorted.
        text: Fingerprint of the text on which the divergence was measured.
        tokens: Number of tokens of that text.
        dtype: Data type of the model's weights.
    """

    model: str = ""
    calibration: str = ""
    methods: tuple[str, ...] = ()
    text: str = ""
    tokens: int = 0
    dtype: str = "float32"

    @property
    def fingerprint(self) -> str:
        """Hash of all attributes, sixteen hexadecimal digits."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check(self, wanted: TableOrigin, where: str) -> None:
        """Check that this origin equals `wanted`.

        Raises:
            ProfileError: An attribute differs; the message names the first one.
        """
        for attribute in dataclasses.fields(self):
            have, want = getattr(self, attribute.name), getattr(wanted, attribute.name)
            if have != want:
                raise ProfileError(
                    f"a sensitivity profile must be of the same {_DESCRIPTIONS[attribute.name]}, but {where} has"
                    f" {_shown(have)} where {_shown(want)} is needed; measure it again with `dse sensitivity`, or name"
                    " the model, texts and methods that it was measured with"
                )


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value) or "none"


_DESCRIPTIONS = {
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

    The divergences of different units are assumed to add up; `scaled` corrects them, for example from measured points.

    Attributes:
        units: In the order of the layers.
        parameters_dense: All parameters of the dense model, tied ones counted once.
        origin: What the table was measured on.
        latency_dense_s: Latency of the dense model; the options' `latency_s` are shares of it. None if not predicted.
        energy_dense_j: Energy of the dense model; the options' `energy_j` are shares of it. None if not predicted.
        one_remains: Groups of units that must not all be removed, for example all attention blocks.
    """

    units: tuple[Unit, ...]
    parameters_dense: int
    origin: TableOrigin = field(default=TableOrigin())
    latency_dense_s: float | None = None
    energy_dense_j: float | None = None
    one_remains: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        unit_names = [unit.name for unit in self.units]
        part_names = [name for unit in self.units for name in unit.names]
        if len(set(unit_names)) < len(unit_names) or len(set(part_names)) < len(part_names):
            raise ProfileError("each unit must appear in a profile once, and each tensor must belong to one unit")
        if sum(unit.dense.parameters for unit in self.units) > self.parameters_dense:
            raise ProfileError(
                f"the units of a profile must hold at most the model's {self.parameters_dense:,} parameters, but they"
                " hold more; measure the profile again"
            )

    @cached_property
    def by_name(self) -> Mapping[str, Unit]:
        """Unit name to unit."""
        return {unit.name: unit for unit in self.units}

    def reduction_of(self, parameters: int) -> float:
        """1 - parameters / dense parameters."""
        return 1 - parameters / self.parameters_dense

    def options_of(self, point: DesignPoint) -> dict[str, Option]:
        """Unit name to the option that the point takes, including dense ones.

        Raises:
            PointError: The point is not a combination of this table's options.
        """
        unit_of = {name: unit for unit in self.units for name in unit.names}
        chosen: dict[str, list[Any]] = {}
        for name, choice in point:
            if name not in unit_of:
                raise PointError(
                    f"a point must consist of the profile's options, but none of its {len(self.units)} units changes"
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
                    f"a point must consist of the profile's options, but '{unit.name}' has no option {listed}; use one"
                    " of the profile's ranks"
                )
            found[unit.name] = option
        return found

    def divergence_of(self, point: DesignPoint) -> float:
        """Sum of the divergences of the point's options, nats per token.

        Raises:
            PointError: The point is not a combination of this table's options.
        """
        return sum(option.divergence for option in self.options_of(point).values())

    def scaled(self, factors: Factors) -> SensitivityTable:
        """The same table with each divergence multiplied by a factor.

        Args:
            factors: Unit name to factor (default 1), or a function of unit and option.
        """

        def factor(unit: Unit, option: Option) -> float:
            return factors(unit, option) if callable(factors) else factors.get(unit.name, 1.0)

        def scaled_option(unit: Unit, option: Option) -> Option:
            if option.is_dense:  # always 0
                return option
            return dataclasses.replace(option, divergence=option.divergence * factor(unit, option))

        units = tuple(
            dataclasses.replace(unit, options=tuple(scaled_option(unit, option) for option in unit.options))
            for unit in self.units
        )
        return dataclasses.replace(self, units=units)

    def to_json(self) -> dict[str, Any]:
        """The whole table as JSON values."""
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
    def from_json(cls, document: Mapping[str, Any]) -> SensitivityTable:
        """Read the output of `to_json`.

        Raises:
            KeyError, TypeError, ValueError, DseError: `document` is not the output of `to_json`, or has another schema
                version.
        """
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
