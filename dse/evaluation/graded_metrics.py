"""Graded metrics: continuous per-document scores, which separate two models with fewer documents than accuracy does.

Accuracy counts a document as right or wrong. If a model gives the right answer a probability of 0.9 and its
decomposition 0.6, both are right and accuracy sees no difference, but the choice probability drops by 0.3. lm-eval
tasks and classification tasks report graded metrics besides their own:

- `choice_probability`: multiple choice and classification.
- `target_log_likelihood`: the same, and cloze tasks (a single continuation, as in LAMBADA).

Perplexities over whole texts and generated answers have no graded metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import special

__all__ = ["CHOICE_PROBABILITY", "GRADED_METRICS", "TARGET_LOG_LIKELIHOOD", "GradedMetric", "choice_probability"]

GradedMetric = Literal["choice_probability", "target_log_likelihood"]

CHOICE_PROBABILITY: GradedMetric = "choice_probability"
"""Probability of the right answer among the choices of a document."""

TARGET_LOG_LIKELIHOOD: GradedMetric = "target_log_likelihood"
"""Log-likelihood (nats) of the right answer, or of the target of a cloze document."""

GRADED_METRICS: tuple[GradedMetric, ...] = (CHOICE_PROBABILITY, TARGET_LOG_LIKELIHOOD)


def choice_probability(log_likelihoods: Sequence[float], right: Sequence[int]) -> float:
    """Softmax over the choices, summed over the right ones.

    Args:
        log_likelihoods: Of each choice given its context (nats), not normalised by length, as `acc` compares them.
        right: Indices of the right choices, usually one.
    """
    values = np.asarray(log_likelihoods, dtype=np.float64)
    return float(np.exp(special.logsumexp(values[list(right)]) - special.logsumexp(values)))
