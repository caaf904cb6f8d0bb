"""Who proposes next: each origin by what its evaluations gained of late."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["chances", "choose"]

_MEMORY = 0.93  # a gain counts half after ten evaluations: what is left to win shrinks as the front grows
_PRIOR_EVALUATIONS = 2.0  # every origin begins as though it had so many average ones
_LEAST_CHANCE = 0.15


def chances(gains: Sequence[tuple[str, float]], origins: Sequence[str]) -> dict[str, float]:
    """Chance of each origin to propose next: its mean gain per evaluation, against the others'.

    A gain fades with each later evaluation, since early evaluations find more to gain whoever proposes them; none
    falls below a least chance, so that an origin whose time comes late is still heard.

    Args:
        gains: Origin and hypervolume gained of each evaluation so far, in order.
        origins: Who competes.

    Returns:
        Origin to chance; they add up to 1. Without any gain all are equal.
    """
    weighted = {origin: [0.0, 0.0] for origin in origins}
    for age, (origin, gain) in enumerate(reversed(gains)):
        if origin in weighted:
            weighted[origin][0] += _MEMORY**age * gain
            weighted[origin][1] += _MEMORY**age
    total_gain = sum(gain for gain, _ in weighted.values())
    total_weight = sum(weight for _, weight in weighted.values())
    average = total_gain / total_weight if total_weight else 0.0
    rates = {
        origin: (gain + _PRIOR_EVALUATIONS * average) / (weight + _PRIOR_EVALUATIONS)
        for origin, (gain, weight) in weighted.items()
    }
    total = sum(rates.values())
    floor = min(_LEAST_CHANCE, 1.0 / len(origins))
    free = 1.0 - floor * len(origins)
    return {origin: floor + free * (rate / total if total > 0 else 1 / len(origins)) for origin, rate in rates.items()}


def choose(gains: Sequence[tuple[str, float]], origins: Sequence[str], generator: random.Random) -> str:
    """Draw who proposes next by `chances`: the same history and generator give the same origin."""
    found = chances(gains, origins)
    return generator.choices(list(found), weights=list(found.values()))[0]
