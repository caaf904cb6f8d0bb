"""lm-eval tasks on the loaded model; the only package that imports EleutherAI's lm_eval."""

from dse.evaluation.lm_eval.evaluator import Evaluator
from dse.evaluation.lm_eval.language_model import ScoringLM
from dse.evaluation.lm_eval.masked_language_model import MaskedScoringLM
from dse.evaluation.lm_eval.shared_prefix import SharedPrefixLM

__all__ = ["Evaluator", "MaskedScoringLM", "ScoringLM", "SharedPrefixLM"]
