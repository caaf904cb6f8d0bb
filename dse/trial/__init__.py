"""Evaluate one design point: accuracy, latency, energy and memory of a trial. Knows nothing of Optuna or the driver."""

from dse.trial.device_rank_multiple import settled_space as settled_space
from dse.trial.engine_measurements import EngineMeasurer as EngineMeasurer
from dse.trial.engine_measurements import engine_pair as engine_pair
from dse.trial.engine_measurements import serving_entry as serving_entry
from dse.trial.measurement_plan import MeasurementPlan as MeasurementPlan
from dse.trial.trial_evaluator import TrialEvaluator as TrialEvaluator
