"""Options that an optimal allocation may contain; a Lagrangian bound rules out the others before the integer program.

Relaxing one budget with a multiplier r >= 0 makes the units independent, so

    bound(r) = sum_u min_o (divergence[u, o] + r use[u, o]) - r limit

is a lower bound of the divergence of every allocation. Forcing option o into unit u raises the bound by the difference
between o and the best option of u. If the raised bound exceeds the divergence of a known feasible allocation, no better
allocation contains o. On the profile of a real model a few options per unit remain, so that the integer program is
solved in milliseconds; the result stays exact.

Source: Sinha and Zoltners (1979); the pegging test of Pisinger (1995) for the multiple-choice knapsack.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["possible_options"]

_MULTIPLIERS = 60
_MARGIN = 1e-9  # relative to the divergences: rounding must not rule out the optimum


def possible_options(
    divergence: NDArray[np.float64],
    use: NDArray[np.float64],
    limit: float,
    unit_of: NDArray[np.int64],
    is_feasible: Callable[[NDArray[np.int64]], bool],
) -> NDArray[np.int64]:
    """Indices of the options that an optimal allocation may contain; all indices if no feasible allocation is found.

    Args:
        divergence: Divergence of each option, shape (options,).
        use: How much of the relaxed budget each option uses, shape (options,), at least 0.
        limit: The relaxed budget.
        unit_of: Unit of each option, ascending from 0, shape (options,).
        is_feasible: Whether an allocation, given as one option index per unit, satisfies all limits.
    """
    starts = np.flatnonzero(np.diff(unit_of, prepend=-1))
    best_bound, best_rate, least = -np.inf, 0.0, np.inf
    low, high = 0.0, _steepest(divergence, use)
    for _ in range(_MULTIPLIERS):
        rate = (low + high) / 2
        chosen = _argmin(divergence + rate * use, unit_of, starts)
        used = float(use[chosen].sum())
        bound = float(divergence[chosen].sum()) + rate * (used - limit)
        if bound > best_bound:
            best_bound, best_rate = bound, rate
        low, high = (rate, high) if used > limit else (low, rate)
        if used <= limit:
            filled = _filled(chosen, divergence, use, limit, unit_of)
            least = min(least, *(float(divergence[c].sum()) for c in (chosen, filled) if is_feasible(c)), np.inf)
    if not np.isfinite(least):
        return np.arange(len(divergence))
    priced = divergence + best_rate * use
    above = priced - priced[_argmin(priced, unit_of, starts)][unit_of]
    margin = _MARGIN * max(float(np.abs(divergence).sum()), 1e-300)
    return np.flatnonzero(best_bound + above <= least + margin)


def _filled(
    chosen: NDArray[np.int64],
    divergence: NDArray[np.float64],
    use: NDArray[np.float64],
    limit: float,
    unit_of: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The allocation improved greedily, one unit at a time, until the budget is used up."""
    filled, room = chosen.copy(), limit - float(use[chosen].sum())
    while True:
        gain = divergence[filled][unit_of] - divergence
        fits = (use - use[filled][unit_of] <= room) & (gain > 0)
        if not fits.any():
            return filled
        best = int(np.argmax(np.where(fits, gain, -np.inf)))
        room -= float(use[best] - use[filled[unit_of[best]]])
        filled[unit_of[best]] = best


def _argmin(values: NDArray[np.float64], unit_of: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the smallest value of each unit."""
    least = np.minimum.reduceat(values, starts)
    index = np.where(values == least[unit_of], np.arange(len(values)), len(values))
    return np.minimum.reduceat(index, starts)


def _steepest(divergence: NDArray[np.float64], use: NDArray[np.float64]) -> float:
    """A multiplier at which only the use decides."""
    steps = np.diff(np.unique(use))
    return float(np.ptp(divergence)) / float(steps.min()) + 1e-300 if steps.size else 1.0
