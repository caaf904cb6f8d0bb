"""Statistical power: the smallest difference that a number of documents detects, and the documents a limit needs.

statsmodels and scipy have no power of the exact McNemar test, so it is summed here from scipy's binomial distribution.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from dse.evaluation.statistics.intervals import normal_quantile

__all__ = ["documents_to_settle", "mcnemar_power", "smallest_detectable_change", "smallest_detectable_drop"]

CONFIDENCE, POWER = 0.95, 0.8
"""Of every smallest detectable difference: two-sided tests at a 5 % level, detected four times in five."""


def mcnemar_power(drop: float, discordance: float, documents: int, confidence: float = CONFIDENCE) -> float:
    """Probability that the exact McNemar test detects a true drop.

    The number of disagreements is binomial (documents, discordance). Given that number, the losses are binomial with
    probability (1 + drop / discordance) / 2, and the test rejects outside its critical values.

    Args:
        drop: True drop in accuracy, 0 <= drop <= discordance.
        discordance: Share of documents on which the two models disagree.
        documents: Number of documents compared.
        confidence: One minus the level of the test.

    Source: Lachin (1992), Statistics in Medicine 11:1239 (the unconditional power of the exact test).
    """
    from scipy.stats import binom  # takes half a second to import, which reading a study does not need

    if discordance <= 0:
        return 0.0
    # Counts further than nine standard deviations from the mean have no weight.
    mean, spread = documents * discordance, math.sqrt(documents * discordance * (1 - discordance))
    first, last = max(0, int(mean - 9 * spread) - 9), min(documents, int(mean + 9 * spread) + 9)
    counts = np.arange(first, last + 1)
    # The largest count of the rarer side at which the test rejects; -1 if it never does.
    level = (1 - confidence) / 2
    critical = binom.ppf(level, counts, 0.5)
    critical = np.where(binom.cdf(critical, counts, 0.5) <= level, critical, critical - 1)
    losing = (1 + drop / discordance) / 2
    rejects = binom.cdf(critical, counts, losing) + binom.sf(counts - critical - 1, counts, losing)
    return float(binom.pmf(counts, documents, discordance) @ rejects)


@functools.lru_cache(maxsize=4096)
def smallest_detectable_drop(
    discordant: int, documents: int, confidence: float = CONFIDENCE, power: float = POWER
) -> float | None:
    """Smallest drop in accuracy that the exact McNemar test detects with this power.

    The observed rate of disagreement is taken as the true one. A drop above it needs at least as many disagreements as
    the drop itself, so the rate is then the drop. Found by bisection of `mcnemar_power`.

    Args:
        discordant: Documents on which the two models disagree, of all `documents` compared.
        confidence: As in `mcnemar_power`; `power` is the probability of detecting the drop.

    Returns:
        The drop as a fraction; None if so few documents would not even detect a drop of 1.
    """
    observed = discordant / documents

    def is_detected(drop: float) -> bool:
        return mcnemar_power(drop, max(observed, drop), documents, confidence) >= power

    if not is_detected(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if is_detected(middle) else (middle, high)
    return high


def smallest_detectable_change(
    standard_error: float | None, confidence: float = CONFIDENCE, power: float = POWER
) -> float | None:
    """(z of the confidence + z of the power) x standard error: 2.80 standard errors by default.

    For graded outcomes, and for means over tasks whose documents have different weights.

    Args:
        standard_error: Of the paired difference or log ratio; None gives None.
        confidence: As in `mcnemar_power`; `power` is the probability of detecting the change.

    Source: Bloom (1995), Evaluation Review 19:547 (minimum detectable effects).
    """
    if standard_error is None:
        return None
    return (normal_quantile((1 + confidence) / 2) + normal_quantile(power)) * standard_error


def documents_to_settle(estimate: float, end: float, limit: float, documents: int) -> int | None:
    """Number of documents at which the end of the interval reaches the limit, if the estimate stays the same.

    The half-width of an interval shrinks with the square root of the number of documents.

    Args:
        estimate: The estimated drop.
        end: The end of its interval on the side of the limit.
        limit: The tolerance.
        documents: Number of documents behind the interval.

    Returns:
        The total number of documents, at least the present one; None if the estimate equals the limit, so that no
        number suffices.
    """
    if estimate == limit:
        return None
    needed = documents * ((end - estimate) / (limit - estimate)) ** 2
    return max(documents, math.ceil(needed - 1e-9)) if math.isfinite(needed) and needed < 1e12 else None
