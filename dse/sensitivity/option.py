"""The ways to treat one unit of a model, each with what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dse.design_point import TensorChoice
from dse.errors import ProfileError

__all__ = ["Option", "Unit"]


@dataclass(frozen=True)
class Option:
    """One way to treat a unit.

    Attributes:
        choices: (name, choice) pairs as in a `DesignPoint`, sorted by name; none for dense.
        parameters: Entries of the unit's matrices, factors in place of what they replace.
        divergence: KL divergence to the dense model on calibration text when this unit alone is treated, nats per token.
        log_likelihood_drop: Of the same text, nats per token, dense minus treated; None where it was not measured.
        latency_s: Predicted share of the unit in the latency that is budgeted; None where nothing predicts it.
        energy_j: Predicted share of the unit in the energy that is budgeted; None where nothing predicts it.
        is_measured: False where the divergence was interpolated between measured options.
    """

    choices: tuple[tuple[str, TensorChoice], ...]
    parameters: int
    divergence: float
    log_likelihood_drop: float | None = None
    latency_s: float | None = None
    energy_j: float | None = None
    is_measured: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(sorted(self.choices)))
        if not math.isfinite(self.divergence) or self.parameters < 0:
            raise ProfileError(
                f"an option must have a finite divergence and `parameters >= 0`, but {self.describe()} has"
                f" divergence={self.divergence} and parameters={self.parameters}; measure the profile anew"
            )

    @property
    def is_dense(self) -> bool:
        """Whether nothing of the unit is decomposed."""
        return not self.choices

    @property
    def removes_block(self) -> bool:
        """Whether the residual stream passes the unit by."""
        return any(choice.is_removal for _, choice in self.choices)

    def describe(self) -> str:
        """For messages: `layers.3.query svd 64, ...`."""
        return ", ".join(f"{name} {choice.method} {choice.rank}" for name, choice in self.choices) or "dense"

    def to_json(self) -> dict[str, Any]:
        """Attributes that are known, choices as in the expanded form of a point."""
        entry: dict[str, Any] = {
            "tensors": {name: choice.to_json() for name, choice in self.choices},
            "parameters": self.parameters,
            "divergence": self.divergence,
        }
        for key in ("log_likelihood_drop", "latency_s", "energy_j"):
            if getattr(self, key) is not None:
                entry[key] = getattr(self, key)
        return entry if self.is_measured else {**entry, "is_measured": False}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Option:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, DseError: It was not written by it.
        """
        choices = tuple((str(name), TensorChoice.from_json(c)) for name, c in entry["tensors"].items())
        known = {key: float(entry[key]) for key in ("log_likelihood_drop", "latency_s", "energy_j") if key in entry}
        return cls(
            choices,
            int(entry["parameters"]),
            float(entry["divergence"]),
            is_measured=bool(entry.get("is_measured", True)),
            **known,
        )


@dataclass(frozen=True)
class Unit:
    """What is decided on as one: an attention block or an MLP block of one layer, or a single tensor.

    Attributes:
        name: `layers.3.attention`, `layers.3.mlp`, or a tensor's name.
        layer: 0-based index; None outside the layers.
        kind: attention, mlp, or the tensor's role.
        options: The ways to treat it; the first is dense, at divergence 0.
    """

    name: str
    layer: int | None
    kind: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or not self.options[0].is_dense or self.options[0].divergence != 0:
            raise ProfileError(f"the first option of unit '{self.name}' must be dense at divergence 0; measure it anew")
        if len({option.choices for option in self.options}) < len(self.options):
            raise ProfileError(f"the options of unit '{self.name}' must differ; list each choice once")

    @property
    def dense(self) -> Option:
        """The option that leaves it as it is."""
        return self.options[0]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name that some option decides on."""
        return frozenset(name for option in self.options for name, _ in option.choices)

    @cached_property
    def by_choices(self) -> Mapping[tuple[tuple[str, TensorChoice], ...], Option]:
        """Choices to option."""
        return {option.choices: option for option in self.options}
