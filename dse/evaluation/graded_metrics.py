"""Graded metrics: they tell two models apart with fewer documents than right-or-wrong does.

A document that a model gets right with probability 0.9 and its decomposition with 0.6 counts nothing in the accuracy
and 0.3 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import special

__all__ = ["CHOICE_PROBABILITY", "GOLD_LOG_LIKELIHOOD", "GRADED_METRICS", "GradedMetric", "choice_probability"]

GradedMetric = Literal["choice_probability", "target_log_likelihood"]

CHOICE_PROBABILITY: GradedMetric = "choice_probability"
"""Probability given to the right answer among the choices of a multiple-choice document."""

GOLD_LOG_LIKELIHOOD: GradedMetric = "target_log_likelihood"
"""Log-likelihood (nats) of the right answer, or of the target of a cloze document."""

GRADED_METRICS: tuple[GradedMetric, ...] = (CHOICE_PROBABILITY, GOLD_LOG_LIKELIHOOD)


def choice_probability(log_likelihoods: Sequence[float], right: Sequence[int]) -> float:
    """Softmax over the choices, summed over the right ones.

    Args:
        log_likelihoods: Of each choice given its context (nats), not normalised by length, as `acc` compares them.
        right: Indices of the right choices, mostly one.
    """
    values = np.asarray(log_likelihoods, dtype=np.float64)
    return float(np.exp(special.logsumexp(values[list(right)]) - special.logsumexp(values)))
