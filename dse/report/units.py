"""Formatting of SI values: one unit prefix and one number of decimals per column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dse.pareto.objective import Objective

__all__ = ["Scale", "change_text", "number_ranges", "percent", "points", "scale_for"]

# From large to small; the last step also serves smaller values. Bytes are decimal (1 MB = 10^6 B), as on model cards.
_STEPS: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "J": ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
    "B": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "percent": ((1e-2, "%"),),
    "count": ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")),
}


@dataclass(frozen=True)
class Scale:
    """Unit and precision in which a quantity is shown.

    Attributes:
        symbol: Unit symbol; "" for a dimensionless number.
        factor: Shown number = SI value x factor.
        decimals: Digits after the decimal point.
    """

    symbol: str
    factor: float
    decimals: int

    def number(self, value: float | None) -> str:
        """The number without its unit; `n/a` if unknown."""
        if value is None or not math.isfinite(value):
            return "n/a"
        return _fixed(value * self.factor, self.decimals)

    def text(self, value: float | None) -> str:
        """The number with its unit: `41.2 ms`."""
        shown = self.number(value)
        return f"{shown} {self.symbol}" if self.symbol and shown != "n/a" else shown

    def uncertainty(self, value: float | None, ends: tuple[float, float] | None) -> str:
        """The 95 % interval relative to its value: `±1.1`, or `-0.4/+1.9` if asymmetric; "" if unknown."""
        if value is None or ends is None or not math.isfinite(value):
            return ""
        below, above = (value - ends[0]) * self.factor, (ends[1] - value) * self.factor
        low, high = (self._spread(side) for side in (below, above))
        # Sides that differ by less than a quarter are shown as one, the larger: the ends are no more precise than that.
        if low == high or (min(below, above) > 0 and max(below, above) < 1.25 * min(below, above)):
            return f"±{self._spread(max(below, above))}"
        return f"-{low}/+{high}"

    def _spread(self, width: float) -> str:
        shown = _fixed(width, self.decimals)
        # A spread below the last shown digit is small, not zero.
        return f"{width:.1g}" if width > 0 and float(shown) == 0 else shown


def scale_for(objective: Objective, values: Iterable[float | None]) -> Scale:
    """The scale that shows the median of `values` (SI) with at least three digits; the plain unit without values."""
    sizes = sorted(abs(value) for value in values if value is not None and math.isfinite(value) and value != 0)
    if objective.is_fraction:
        return Scale("", 1.0, 3)
    if not sizes:
        size, symbol = next((step for step in _STEPS.get(objective.unit, ()) if step[0] <= 1.0), (1.0, objective.unit))
        return Scale(symbol, 1.0 / size, 1)
    middle = sizes[len(sizes) // 2]
    steps = _STEPS.get(objective.unit, ((1.0, objective.unit),))
    # The margin shows 0.9996 s as 1.00 s instead of 999.6 ms.
    size, symbol = next((step for step in steps if middle >= step[0] * 0.9995), steps[-1])
    decimals = min(4, max(1, 2 - math.floor(math.log10(middle / size) + 1e-3)))
    return Scale(symbol, 1.0 / size, decimals)


def percent(fraction: float | None, decimals: int = 1) -> str:
    """`12.3 %`, or `n/a`."""
    return "n/a" if fraction is None or not math.isfinite(fraction) else f"{_fixed(100 * fraction, decimals)} %"


def points(difference: float | None, decimals: int = 1) -> str:
    """A difference of two fractions in percentage points: `-3.1 pts`, or `n/a`."""
    if difference is None or not math.isfinite(difference):
        return "n/a"
    shown = _fixed(100 * difference, decimals)
    return f"{'+' if float(shown) > 0 else ''}{shown} pts"


def number_ranges(numbers: Iterable[int]) -> str:
    """Ascending integers as ranges: `0-3, 7` for 0, 1, 2, 3, 7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def change_text(
    objective: Objective, change: tuple[float, tuple[float, float] | None] | None, with_interval: bool = False
) -> str:
    """Change from dense: `-3.1 pts`, `-0.21 nats` or `x0.93`, optionally with its 95 % interval; `n/a` if unknown."""
    if change is None:
        return "n/a"
    amount, ends = change
    text = _amount_text(objective, amount)
    if not with_interval or ends is None:
        return text
    if objective.is_difference:
        return f"{text} [{', '.join(_amount_text(objective, end).split()[0] for end in ends)}]"
    return f"{text} [{', '.join(_fixed(end, _ratio_decimals(amount)) for end in ends)}]"


def _amount_text(objective: Objective, amount: float) -> str:
    if objective.is_fraction:
        return points(amount)
    if objective.is_difference:
        shown = _fixed(amount, 2)
        return f"{'+' if float(shown) > 0 else ''}{shown} {objective.unit}"
    return f"x{_fixed(amount, _ratio_decimals(amount))}"


def _ratio_decimals(ratio: float) -> int:
    return 2 if abs(ratio) < 100 else 0


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text
