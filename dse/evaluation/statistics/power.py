"""How much this many documents can show, and how many would show it."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = [
    "CONFIDENCE",
    "POWER",
    "documents_to_settle",
    "mcnemar_power",
    "smallest_detectable_change",
    "smallest_detectable_drop",
]

CONFIDENCE, POWER = 0.95, 0.8
"""Of every smallest detectable difference: two-sided tests at 5 %, shown four times in five."""

_NORMAL = NormalDist()


def mcnemar_power(drop: float, discordance: float, documents: int, confidence: float = CONFIDENCE) -> float:
    """Chance that the exact McNemar test finds a true drop.

    The number of disagreements is binomial (documents, discordance); given it, the losses are binomial with
    probability (1 + drop / discordance) / 2; the test rejects outside its own critical values.

    Args:
        drop: True drop in accuracy, 0 <= drop <= discordance.
        discordance: Share of documents on which the two models disagree.
        documents: Compared.
        confidence: One minus the level of the test.

    Source: Lachin (1992), Statistics in Medicine 11:1239 (the unconditional power of the exact test).
    """
    if discordance <= 0:
        return 0.0
    centre, spread = documents * discordance, math.sqrt(documents * discordance * (1 - discordance))
    first, last = max(0, int(centre - 9 * spread) - 9), min(documents, int(centre + 9 * spread) + 9)
    counts = np.arange(first, last + 1)
    log_chance = (
        special.gammaln(documents + 1) - special.gammaln(counts + 1) - special.gammaln(documents - counts + 1)
        + special.xlogy(counts, discordance) + special.xlog1py(documents - counts, -discordance)
    )  # fmt: skip
    critical = _critical_values(counts, confidence)
    losing = (1 + drop / discordance) / 2
    can_reject = critical >= 0
    kept, size = critical[can_reject], counts[can_reject]
    rejects = np.zeros(counts.size)
    rejects[can_reject] = special.bdtr(kept, size, losing) + special.bdtrc(size - kept - 1, size, losing)
    return float(np.exp(log_chance) @ rejects)


@functools.lru_cache(maxsize=4096)
def smallest_detectable_drop(
    discordant: int, documents: int, confidence: float = CONFIDENCE, power: float = POWER
) -> float | None:
    """Smallest drop in accuracy that the exact McNemar test finds with this power.

    The observed discordance rate stands for the true one; a drop above it needs at least as many disagreements as
    itself, so the rate is then the drop. Found by bisection of `mcnemar_power`.

    Args:
        discordant: Documents on which the two models were seen to disagree.
        documents: Compared.
        confidence: One minus the level of the test.
        power: Chance that the drop is found.

    Returns:
        The drop as a fraction; None where so few documents would not even show a drop of 1.
    """
    observed = discordant / documents

    def is_found(drop: float) -> bool:
        return mcnemar_power(drop, max(observed, drop), documents, confidence) >= power

    if not is_found(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high


def smallest_detectable_change(
    standard_error: float | None, confidence: float = CONFIDENCE, power: float = POWER
) -> float | None:
    """(z of the confidence + z of the power) x standard error: 2.80 standard errors by default.

    For graded outcomes and for means over tasks whose documents count differently.

    Args:
        standard_error: Of the paired difference (or log ratio); None gives None.
        confidence: One minus the level of the two-sided test.
        power: Chance that the change is found.

    Source: Bloom (1995), Evaluation Review 19:547 (minimum detectable effects).
    """
    if standard_error is None:
        return None
    return (_NORMAL.inv_cdf((1 + confidence) / 2) + _NORMAL.inv_cdf(power)) * standard_error


def documents_to_settle(estimate: float, end: float, limit: float, documents: int) -> int | None:
    """Documents at which the interval's end would come to lie on the limit, if the estimate stays.

    The half-width of an interval falls with the square root of the documents.

    Args:
        estimate: Of the drop.
        end: End of its interval on the limit's side.
        limit: Tolerance that it should clear.
        documents: Behind the interval.

    Returns:
        Documents in all, at least the present number; None where estimate and limit coincide, so that no number will
        do.
    """
    if estimate == limit:
        return None
    needed = documents * ((end - estimate) / (limit - estimate)) ** 2
    return max(documents, math.ceil(needed - 1e-9)) if math.isfinite(needed) and needed < 1e12 else None


def _critical_values(counts: NDArray[np.int64], confidence: float) -> NDArray[np.int64]:
    """Most frequent that the rarer side may be for the exact test to reject; -1 where it never does."""
    level = (1 - confidence) / 2
    # The normal quantile comes within one or two of the exact one, which is then stepped to.
    guess = np.floor(counts / 2 + _NORMAL.inv_cdf(level) * np.sqrt(counts) / 2).astype(np.int64)
    critical = np.full(counts.size, -1, dtype=np.int64)
    for shift in range(-3, 4):
        candidate = guess + shift
        fits = (candidate >= 0) & (candidate <= counts)
        fits[fits] = special.bdtr(candidate[fits], counts[fits], 0.5) <= level
        critical = np.where(fits, np.maximum(critical, candidate), critical)
    return critical
