"""The Pareto front: dominance, hypervolume, knee, ties and recommendation."""

from __future__ import annotations

from dse.pareto.dominance import dominates, non_dominated, non_dominated_rank
from dse.pareto.front import front_hypervolume, front_table, mark_front, objective_values
from dse.pareto.hypervolume import hypervolume, normalised_hypervolume
from dse.pareto.knee import knee_distances, knee_index
from dse.pareto.objective import (
    OBJECTIVES,
    Objective,
    directions_of,
    objective_named,
    objectives_named,
    reference_point,
    reference_value,
)
from dse.pareto.recommend import Recommendation, recommend
from dse.pareto.ties import mark_ties, tied_table

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Recommendation",
    "directions_of",
    "dominates",
    "front_hypervolume",
    "front_table",
    "hypervolume",
    "knee_distances",
    "knee_index",
    "mark_front",
    "mark_ties",
    "non_dominated",
    "non_dominated_rank",
    "normalised_hypervolume",
    "objective_named",
    "objective_values",
    "objectives_named",
    "recommend",
    "reference_point",
    "reference_value",
    "tied_table",
]
