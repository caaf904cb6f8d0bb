"""Objectives of a study: unit, direction, hypervolume reference and ideal value of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dse.defaults import RENAMED_OBJECTIVES
from dse.errors import ConfigError, NonFiniteError, did_you_mean

__all__ = [
    "OBJECTIVES",
    "REDUCTION",
    "Direction",
    "Objective",
    "directions_of",
    "ideal_point",
    "objective_named",
    "objectives_named",
    "reference_point",
    "reference_value",
    "signs",
]

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Objective:
    """One objective, named after its column in the trials table.

    Attributes:
        name: Column of the trials table, such as `decode_latency_s`.
        unit: Unit of that column: "s", "J", "tokens/s", "B" (bytes), "fraction", "percent" (a fraction shown in
            percent), "nats", "count", or "" for a dimensionless number.
        direction: Whether smaller or larger is better.
        label: Axis label and column title.
        dense_reference_factor: The hypervolume reference is this factor times the dense model's value. A point worse
            than the reference adds nothing to the hypervolume.
        ideal: The best possible value; it normalises the hypervolume.
        is_cost: Whether a better ratio to dense is a saving (not so for accuracy, perplexity and graded metrics).
        fixed_reference: The hypervolume reference itself; for objectives whose dense value is the ideal, so that no
            multiple of it can serve.
        ideal_reference_factor: The ideal as a multiple of the hypervolume reference; for objectives without a bound.
    """

    name: str
    unit: str
    direction: Direction
    label: str
    dense_reference_factor: float
    ideal: float = 0.0
    is_cost: bool = True
    fixed_reference: float | None = None
    ideal_reference_factor: float | None = None

    @property
    def is_fraction(self) -> bool:
        """Whether a change is reported in percentage points."""
        return self.unit == "fraction"

    @property
    def is_difference(self) -> bool:
        """Whether a change is reported as a difference (fractions, log-likelihoods) instead of a ratio."""
        return self.unit in ("fraction", "nats")

    def ideal_for(self, reference: float) -> float:
        """The ideal that belongs to this hypervolume reference."""
        return self.ideal if self.ideal_reference_factor is None else self.ideal_reference_factor * reference

    @property
    def sign(self) -> float:
        """+1 if smaller is better, -1 if larger is, so that `sign * value` is always minimised."""
        return 1.0 if self.direction == "minimize" else -1.0


# Parameters and weight bytes never exceed those of the dense model, so 1.1 leaves a small margin. Latency and energy
# can exceed dense: two thin products may be slower than one. At ten times the dense perplexity, or three times the
# dense log-likelihood of the targets, a model is unusable.
_ALL = (
    Objective("accuracy", "fraction", "maximize", "Accuracy", 0.0, ideal=1.0, is_cost=False),
    Objective("perplexity", "", "minimize", "Perplexity", 10.0, ideal=1.0, is_cost=False),
    Objective("choice_probability", "fraction", "maximize", "Choice probability", 0.0, ideal=1.0, is_cost=False),
    Objective("target_log_likelihood", "nats", "maximize", "Target log-likelihood", 3.0, ideal=0.0, is_cost=False),
    # ln 10: on text sampled from the dense model, a perplexity of ten times dense is a divergence of ln 10.
    Objective(
        "kl_divergence", "nats", "minimize", "KL divergence to dense", 0.0, is_cost=False, fixed_reference=math.log(10)
    ),
    Objective("prefill_latency_s", "s", "minimize", "Prefill latency", 1.5),
    Objective("decode_latency_s", "s", "minimize", "Decode latency", 1.5),
    Objective("prefill_energy_j", "J", "minimize", "Prefill energy", 1.5),
    Objective("energy_per_token_j", "J", "minimize", "Energy per token", 1.5),
    Objective("ttft_s", "s", "minimize", "Time to first token", 1.5),
    Objective("tpot_s", "s", "minimize", "Time per output token", 1.5),
    # Throughput has no upper bound: six times the reference is four times dense.
    Objective(
        "throughput_tokens_s", "tokens/s", "maximize", "Throughput", 1 / 1.5, ideal=math.inf, ideal_reference_factor=6.0
    ),
    Objective("request_energy_j", "J", "minimize", "Energy per request", 1.5),
    Objective("output_token_energy_j", "J", "minimize", "Serving energy per output token", 1.5),
    Objective("parameters", "count", "minimize", "Parameters", 1.1),
    Objective("weight_bytes", "B", "minimize", "Weight size", 1.1),
    Objective("peak_memory_bytes", "B", "minimize", "Peak memory", 1.5),
)
OBJECTIVES: Mapping[str, Objective] = {entry.name: entry for entry in _ALL}

# An axis of plots, not an objective: parameters are optimised instead.
REDUCTION = Objective("reduction", "percent", "maximize", "Reduction", 0.0, ideal=1.0)


def objective_named(name: str) -> Objective:
    """Look up an objective, also by its name in version 0.1.

    Raises:
        ConfigError: The name is unknown; the message suggests the nearest one.
    """
    try:
        return OBJECTIVES[RENAMED_OBJECTIVES.get(name, name)]
    except KeyError:
        raise ConfigError(
            f"an objective must be one of {', '.join(OBJECTIVES)}, but got {name!r}{did_you_mean(name, OBJECTIVES)}"
        ) from None


def objectives_named(names: Iterable[str]) -> tuple[Objective, ...]:
    """Look up objectives, in order.

    Raises:
        ConfigError: A name is unknown or repeated, or no name is given.
    """
    chosen = tuple(objective_named(name) for name in names)
    if not chosen:
        raise ConfigError("a study needs at least one objective, but got none; name some, such as accuracy, parameters")
    given = [entry.name for entry in chosen]
    if len(set(given)) != len(given):
        raise ConfigError(f"each objective may be given once, but got {', '.join(given)}; remove the repeated one")
    return chosen


def directions_of(objectives: Sequence[Objective]) -> tuple[Direction, ...]:
    """The direction of each objective, in order."""
    return tuple(entry.direction for entry in objectives)


def ideal_point(objectives: Sequence[Objective], reference: Sequence[float]) -> list[float]:
    """The best possible value of each objective, given the hypervolume reference in the same order."""
    return [entry.ideal_for(value) for entry, value in zip(objectives, reference, strict=True)]


def signs(directions: Sequence[str]) -> npt.NDArray[np.float64]:
    """+1 for "minimize" and -1 for "maximize", shape (k,): `values * signs` is minimised.

    Raises:
        ConfigError: A direction is neither of the two.
    """
    for direction in directions:
        if direction not in ("minimize", "maximize"):
            raise ConfigError(f"a direction must be 'minimize' or 'maximize', but got {direction!r}")
    return np.array([1.0 if direction == "minimize" else -1.0 for direction in directions], dtype=np.float64)


def reference_value(objective: Objective, dense_value: float) -> float:
    """Coordinate of the hypervolume reference point, from the dense model's value in the same unit.

    0 for accuracy and choice probability; 1.1 x dense for parameters and weight bytes; 1.5 x dense for latency, energy
    and memory; dense / 1.5 for throughput; 10 x dense for perplexity; 3 x dense for the target log-likelihood; ln 10
    for the KL divergence, which is 0 for the dense model.

    Raises:
        NonFiniteError: The dense value is NaN or infinite.
        ConfigError: The resulting reference is no worse than the ideal.
    """
    if not math.isfinite(dense_value):
        raise NonFiniteError(
            f"the dense model's {objective.name} must be finite to set the hypervolume reference, but got {dense_value}"
        )
    reference = objective.dense_reference_factor * float(dense_value)
    if objective.fixed_reference is not None:
        reference = objective.fixed_reference
    ideal = objective.ideal_for(reference)
    if (reference - ideal) * objective.sign <= 0:
        raise ConfigError(
            f"the reference of {objective.name} must be worse than its ideal {ideal:g}, but the dense value"
            f" {dense_value:g} gives {reference:g}; check the measurement of the dense model"
        )
    return reference


def reference_point(objectives: Sequence[Objective], dense: Mapping[str, float]) -> dict[str, float]:
    """Hypervolume reference of every objective, from the dense model's values by name.

    Raises:
        NonFiniteError: A dense value is missing, NaN or infinite.
        ConfigError: A resulting reference is no worse than the ideal.
    """
    return {entry.name: reference_value(entry, dense.get(entry.name, math.nan)) for entry in objectives}
