"""Numerics of the Pareto front: dominance, hypervolume, knee, ties, choice of a point. Arrays in, arrays out."""

from __future__ import annotations

from dse.pareto.choice import Candidates, PointChoice, choose_point
from dse.pareto.dominance import non_dominated
from dse.pareto.hypervolume import GrowingHypervolume, hypervolume, normalised_hypervolume
from dse.pareto.knee import knee_distances, knee_index
from dse.pareto.objective import (
    OBJECTIVES,
    REDUCTION,
    Objective,
    directions_of,
    ideal_point,
    objective_named,
    objectives_named,
    reference_point,
    reference_value,
)
from dse.pareto.ties import advantage_within_noise, tied_rows

__all__ = [
    "OBJECTIVES",
    "REDUCTION",
    "Candidates",
    "GrowingHypervolume",
    "Objective",
    "PointChoice",
    "advantage_within_noise",
    "choose_point",
    "directions_of",
    "hypervolume",
    "ideal_point",
    "knee_distances",
    "knee_index",
    "non_dominated",
    "normalised_hypervolume",
    "objective_named",
    "objectives_named",
    "reference_point",
    "reference_value",
    "tied_rows",
]
