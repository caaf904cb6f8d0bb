"""Exact log-likelihoods of many continuations, with shared prefixes computed once; needs torch but not lm-eval."""

from dse.evaluation.scoring.packing import Query, Row, pack
from dse.evaluation.scoring.scorer import Scorer, Strategy
from dse.evaluation.scoring.state_queue import Score
from dse.evaluation.scoring.target_head import TargetHead, TargetScores

__all__ = ["Query", "Row", "Score", "Scorer", "Strategy", "TargetHead", "TargetScores", "pack"]
