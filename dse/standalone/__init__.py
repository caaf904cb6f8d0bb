"""Operations on one model without a study: cost, search space, evaluation, measurement, sensitivity, allocation.

Each command of `dse` that needs no study folder calls one function of this package.
"""

from dse.standalone.allocate_points import AllocationRequest as AllocationRequest
from dse.standalone.allocate_points import LatencyBudget as LatencyBudget
from dse.standalone.allocate_points import allocate_points as allocate_points
from dse.standalone.config_only import ModelCost as ModelCost
from dse.standalone.config_only import describe_space as describe_space
from dse.standalone.config_only import model_cost as model_cost
from dse.standalone.evaluate_model import evaluate_model as evaluate_model
from dse.standalone.measure_model import MeasurementRequest as MeasurementRequest
from dse.standalone.measure_model import measure_model as measure_model
from dse.standalone.model_request import CalibrationText as CalibrationText
from dse.standalone.model_request import ModelRequest as ModelRequest
from dse.standalone.rank_timings import RankTimingRequest as RankTimingRequest
from dse.standalone.rank_timings import rank_timings_html as rank_timings_html
from dse.standalone.rank_timings import time_ranks as time_ranks
from dse.standalone.sensitivity_run import SensitivityRequest as SensitivityRequest
from dse.standalone.sensitivity_run import run_sensitivity as run_sensitivity
from dse.standalone.sensitivity_run import write_profile as write_profile

__all__ = [
    "AllocationRequest",
    "CalibrationText",
    "LatencyBudget",
    "MeasurementRequest",
    "ModelCost",
    "ModelRequest",
    "RankTimingRequest",
    "SensitivityRequest",
    "allocate_points",
    "describe_space",
    "evaluate_model",
    "measure_model",
    "model_cost",
    "rank_timings_html",
    "run_sensitivity",
    "time_ranks",
    "write_profile",
]
