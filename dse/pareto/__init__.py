"""The Pareto front: dominance, hypervolume, knee, recommendation, tables, plots and the report page."""

from __future__ import annotations

from dse.pareto.dominance import dominates, non_dominated, non_dominated_rank
from dse.pareto.front import front_hypervolume, front_table, mark_front, objective_values
from dse.pareto.heat_map import HeatMap, heat_map_html
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
from dse.pareto.plots import plot_front
from dse.pareto.png import front_png, heat_map_png
from dse.pareto.point_map import MapCell, PointMap
from dse.pareto.rank_curves import RankCurve, RankPanel, rank_curves_html
from dse.pareto.recommend import Recommendation, recommend
from dse.pareto.report import front_html
from dse.pareto.table import format_front, format_tied, front_text, tied_text, to_records
from dse.pareto.ties import mark_ties, tied_table

__all__ = [
    "OBJECTIVES",
    "HeatMap",
    "MapCell",
    "Objective",
    "PointMap",
    "RankCurve",
    "RankPanel",
    "Recommendation",
    "directions_of",
    "dominates",
    "format_front",
    "format_tied",
    "front_html",
    "front_hypervolume",
    "front_png",
    "front_table",
    "front_text",
    "heat_map_html",
    "heat_map_png",
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
    "plot_front",
    "rank_curves_html",
    "recommend",
    "reference_point",
    "reference_value",
    "tied_table",
    "tied_text",
    "to_records",
]
