"""Operations without a running study: cost, search space, evaluation, measurement, sensitivity, allocation, export.

Each command of `dse` that does not run a study calls one function of this package.
"""

from dse.standalone.allocate_points import AllocationRequest, LatencyBudget, allocate_points
from dse.standalone.config_only import ModelCost, describe_space, model_cost
from dse.standalone.evaluate_model import evaluate_model
from dse.standalone.export_trials import export_trials
from dse.standalone.heal_study import heal_study
from dse.standalone.measure_engine import EngineRequest, measure_study
from dse.standalone.measure_model import MeasurementRequest, measure_model
from dse.standalone.model_request import CalibrationText, ModelRequest
from dse.standalone.rank_timings import RankTimingRequest, rank_timings_html, time_ranks
from dse.standalone.sensitivity_run import SensitivityRequest, run_sensitivity, write_profile

__all__ = [
    "AllocationRequest",
    "CalibrationText",
    "EngineRequest",
    "LatencyBudget",
    "MeasurementRequest",
    "ModelCost",
    "ModelRequest",
    "RankTimingRequest",
    "SensitivityRequest",
    "allocate_points",
    "describe_space",
    "evaluate_model",
    "export_trials",
    "heal_study",
    "measure_model",
    "measure_study",
    "model_cost",
    "rank_timings_html",
    "run_sensitivity",
    "time_ranks",
    "write_profile",
]
