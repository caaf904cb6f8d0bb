"""Options: the ways to treat one unit of a model, with the cost and the expected divergence of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dse.design_point import TensorChoice
from dse.errors import ProfileError

__all__ = ["Choices", "Option", "Unit"]

Choices = tuple[tuple[str, TensorChoice], ...]
"""(name, choice) pairs as in a `DesignPoint`."""

_OPTIONAL_KEYS = ("log_likelihood_drop", "latency_s", "energy_j")


@dataclass(frozen=True)
class Option:
    """One way to treat a unit.

    Attributes:
        choices: (name, choice) pairs as in a `DesignPoint`, sorted by name; empty for dense.
        parameters: Parameters of the unit, with factors counted instead of the matrices that they replace.
        divergence: Expected KL divergence from the dense model if only this unit is changed, nats per token.
        log_likelihood_drop: Log-likelihood of the same text, dense minus changed, nats per token; None if not measured.
        latency_s: Predicted share of the unit in the budgeted latency; None if not predicted.
        energy_j: Predicted share of the unit in the budgeted energy; None if not predicted.
        is_measured: False if the divergence was interpolated or estimated.
    """

    choices: Choices
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
                f" divergence={self.divergence} and parameters={self.parameters}; measure the profile again"
            )

    @property
    def is_dense(self) -> bool:
        """Whether the option leaves the unit dense."""
        return not self.choices

    @property
    def removes_block(self) -> bool:
        """Whether the option removes a block, so that only the residual connection remains."""
        return any(choice.is_removal for _, choice in self.choices)

    @property
    def narrows_mlp(self) -> bool:
        """Whether the option reduces the width of an MLP, so that all its matrices get smaller."""
        return any(choice.is_width for _, choice in self.choices)

    def describe(self) -> str:
        """The choices as text for messages: `layers.3.query svd 64, ...`."""
        return ", ".join(f"{name} {choice.title} {choice.rank}" for name, choice in self.choices) or "dense"

    def to_json(self) -> dict[str, Any]:
        """The option as JSON values, without unknown attributes; choices as in the expanded form of a point."""
        entry: dict[str, Any] = {
            "tensors": {name: choice.to_json() for name, choice in self.choices},
            "parameters": self.parameters,
            "divergence": self.divergence,
        }
        entry |= {key: getattr(self, key) for key in _OPTIONAL_KEYS if getattr(self, key) is not None}
        return entry if self.is_measured else {**entry, "is_measured": False}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Option:
        """Read the output of `to_json`; files of earlier versions call the divergence `damage`.

        Raises:
            KeyError, TypeError, ValueError, DseError: `entry` is not the output of `to_json`.
        """
        choices = tuple((str(name), TensorChoice.from_json(c)) for name, c in entry["tensors"].items())
        return cls(
            choices,
            int(entry["parameters"]),
            float(entry["divergence"] if "divergence" in entry else entry["damage"]),
            is_measured=bool(entry.get("is_measured", True)),
            **{key: float(entry[key]) for key in _OPTIONAL_KEYS if key in entry},
        )


@dataclass(frozen=True)
class Unit:
    """A part of the model that takes one option: the attention or MLP block of one layer, a group, or a single tensor.

    Attributes:
        name: `layers.3.attention`, `layers.3.mlp`, or the name of a tensor.
        layer: 0-based index; None outside the layers.
        kind: attention, mlp, or the role of the tensor.
        options: The ways to treat the unit; the first is dense, with divergence 0.
    """

    name: str
    layer: int | None
    kind: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or not self.options[0].is_dense or self.options[0].divergence != 0:
            raise ProfileError(
                f"the first option of unit '{self.name}' must be dense at divergence 0; measure the profile again"
            )
        if len({option.choices for option in self.options}) < len(self.options):
            raise ProfileError(f"the options of unit '{self.name}' must differ; list each choice once")

    @property
    def dense(self) -> Option:
        """The option that leaves the unit dense."""
        return self.options[0]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all parts (tensors, stacks, blocks) that the options change."""
        return frozenset(name for option in self.options for name, _ in option.choices)

    @cached_property
    def by_choices(self) -> Mapping[Choices, Option]:
        """Choices to option."""
        return {option.choices: option for option in self.options}
