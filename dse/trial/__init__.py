"""Evaluate one design point: accuracy, latency, energy and memory of a trial. Knows nothing of Optuna or the driver."""

from dse.trial.device_rank_multiple import settled_space as settled_space
from dse.trial.trial_evaluator import TrialEvaluator as TrialEvaluator
