"""What a study trades off: each objective's unit, direction, reference and ideal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dse.errors import ConfigError, NonFiniteError, did_you_mean

__all__ = [
    "OBJECTIVES",
    "REDUCTION",
    "Direction",
    "Objective",
    "directions_of",
    "objective_named",
    "objectives_named",
    "reference_point",
    "reference_value",
    "signs",
]

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Objective:
    """One axis of the trade-off, named after its column in the trials table.

    Attributes:
        name: Column of the trials table, such as `decode_latency_s`.
        unit: Unit of that column: "s", "J", "B" (bytes), "fraction", "percent" (a fraction, but shown in percent),
            "nats", "count", or "" for a pure number.
        direction: Whether smaller or larger is better.
        label: What people read on an axis or a table's head.
        dense_reference_factor: The hypervolume reference is this factor times the dense model's value. A point worse
            than the reference adds nothing to the hypervolume.
        fixed_reference: The hypervolume reference itself, where dense is at the ideal and a factor of it says nothing.
        ideal: The best value that can be thought of; it normalises the hypervolume.
        is_cost: Whether its ratio to dense counts as a saving (accuracy, perplexity and graded metrics do not).
    """

    name: str
    unit: str
    direction: Direction
    label: str
    dense_reference_factor: float
    ideal: float = 0.0
    is_cost: bool = True
    fixed_reference: float | None = None

    @property
    def is_fraction(self) -> bool:
        """Whether a change is told in percentage points."""
        return self.unit == "fraction"

    @property
    def is_difference(self) -> bool:
        """Whether a change is a difference rather than a ratio; so it is for fractions and for log-likelihoods."""
        return self.unit in ("fraction", "nats")

    @property
    def sign(self) -> float:
        """+1 where smaller is better and -1 where larger is, so that `sign * value` is always minimised."""
        return 1.0 if self.direction == "minimize" else -1.0


def _table(*objectives: Objective) -> dict[str, Objective]:
    return {entry.name: entry for entry in objectives}


# Parameters and weight bytes never exceed the dense model's, so 1.1 leaves a thin margin; timed and metered costs can
# come out above dense (two thin products may run slower than one), and a perplexity of ten times dense is a wreck, as
# is a log-likelihood of gold three times as far from zero.
OBJECTIVES: Mapping[str, Objective] = _table(
    Objective("accuracy", "fraction", "maximize", "Accuracy", 0.0, ideal=1.0, is_cost=False),
    Objective("perplexity", "", "minimize", "Perplexity", 10.0, ideal=1.0, is_cost=False),
    Objective("choice_probability", "fraction", "maximize", "Choice probability", 0.0, ideal=1.0, is_cost=False),
    Objective("target_log_likelihood", "nats", "maximize", "Gold log-likelihood", 3.0, ideal=0.0, is_cost=False),
    # ln 10: what a perplexity of ten times dense comes to on text that the dense model itself would write.
    Objective(
        "kl_divergence",
        "nats",
        "minimize",
        "KL divergence to dense",
        0.0,
        is_cost=False,
        fixed_reference=math.log(10),
    ),
    Objective("prefill_latency_s", "s", "minimize", "Prefill latency", 1.5),
    Objective("decode_latency_s", "s", "minimize", "Decode latency", 1.5),
    Objective("prefill_energy_j", "J", "minimize", "Prefill energy", 1.5),
    Objective("energy_per_token_j", "J", "minimize", "Energy per token", 1.5),
    Objective("parameters", "count", "minimize", "Parameters", 1.1),
    Objective("weight_bytes", "B", "minimize", "Weight size", 1.1),
    Objective("peak_memory_bytes", "B", "minimize", "Peak memory", 1.5),
)

# Never optimised (parameters are), but an axis that people ask for.
REDUCTION = Objective("reduction", "percent", "maximize", "Reduction", 0.0, ideal=1.0)


def objective_named(name: str) -> Objective:
    """The objective of this name.

    Raises:
        ConfigError: There is none; the message names the nearest.
    """
    try:
        return OBJECTIVES[name]
    except KeyError:
        raise ConfigError(
            f"an objective must be one of {', '.join(OBJECTIVES)}, but got {name!r}{did_you_mean(name, OBJECTIVES)}"
        ) from None


def objectives_named(names: Iterable[str]) -> tuple[Objective, ...]:
    """The objectives of these names, in order.

    Raises:
        ConfigError: A name is unknown or given twice, or there is none.
    """
    chosen = tuple(objective_named(name) for name in names)
    if not chosen:
        raise ConfigError("a study needs at least one objective, but got none; name some, such as accuracy, parameters")
    given = [entry.name for entry in chosen]
    if len(set(given)) != len(given):
        raise ConfigError(f"an objective may be named once, but got {', '.join(given)}; drop the repeated one")
    return chosen


def directions_of(objectives: Sequence[Objective]) -> tuple[Direction, ...]:
    """The direction of each objective, in order."""
    return tuple(entry.direction for entry in objectives)


def signs(directions: Sequence[str]) -> npt.NDArray[np.float64]:
    """+1 for "minimize" and -1 for "maximize", shape (k,): values times signs are to be minimised.

    Raises:
        ConfigError: A direction is neither.
    """
    for direction in directions:
        if direction not in ("minimize", "maximize"):
            raise ConfigError(f"a direction must be 'minimize' or 'maximize', but got {direction!r}")
    return np.array([1.0 if direction == "minimize" else -1.0 for direction in directions], dtype=np.float64)


def reference_value(objective: Objective, dense_value: float) -> float:
    """Coordinate of the hypervolume reference point, from the dense model's value in the same unit.

    Accuracy and choice probability: 0. Parameters and weight bytes: 1.1 x dense. Latency, energy and memory: 1.5 x
    dense. Perplexity: 10 x. Gold log-likelihood: 3 x. KL divergence, of which
    dense has none: ln 10.

    Raises:
        NonFiniteError: The dense value is NaN or infinite, so that nothing can be referred to it.
        ConfigError: The dense value leaves no room between the reference and the ideal.
    """
    if not math.isfinite(dense_value):
        raise NonFiniteError(
            f"the dense model's {objective.name} must be finite to fix the hypervolume reference, but got {dense_value}"
        )
    reference = objective.dense_reference_factor * float(dense_value)
    if objective.fixed_reference is not None:
        reference = objective.fixed_reference
    if (reference - objective.ideal) * objective.sign <= 0:
        raise ConfigError(
            f"the reference of {objective.name} must be worse than its ideal {objective.ideal:g}, but the dense value"
            f" {dense_value:g} gives {reference:g}; check how the dense model was measured"
        )
    return reference


def reference_point(objectives: Sequence[Objective], dense: Mapping[str, float]) -> dict[str, float]:
    """Reference value of every objective, from the dense model's values by name.

    Raises:
        NonFiniteError: A dense value is missing, NaN or infinite.
        ConfigError: A dense value leaves no room between the reference and the ideal.
    """
    return {entry.name: reference_value(entry, dense.get(entry.name, math.nan)) for entry in objectives}
