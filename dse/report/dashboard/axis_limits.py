"""The extent of an axis, with strips before its low end for trials without a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dse.report.dashboard.axis_values import AxisValues

__all__ = ["AxisLimits"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class AxisLimits:
    """Extent of an axis. Trials without a value lie in a strip before its low end.

    Attributes:
        low: Low end of the values.
        high: High end.
        has_strip: Whether trials lie in the strip.
        has_second: Whether a second strip holds trials without a value on either axis.
    """

    low: float
    high: float
    has_strip: bool
    has_second: bool = False

    @classmethod
    def of(cls, values: AxisValues, shown: Mask, front: Mask, has_strip: bool, has_second: bool = False) -> AxisLimits:
        """The extent of the values, and of the intervals of the front unless they are much wider, with a margin."""
        inside = values.value[shown & np.isfinite(values.value)]
        if inside.size == 0:
            return cls(0.0, 1.0, has_strip, has_second)
        low, high = float(inside.min()), float(inside.max())
        most = 0.6 * (high - low)
        ends = [column[front & np.isfinite(column)] for column in (values.low, values.high)]
        if ends[0].size and most > 0:
            low, high = max(min(low, ends[0].min()), low - most), min(max(high, ends[1].max()), high + most)
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, has_strip, has_second)

    @property
    def strip(self) -> float:
        """Coordinate of the trials in the strip."""
        return self.low - 0.05 * (self.high - self.low)

    @property
    def second_strip(self) -> float:
        """Coordinate of the trials without a value on either axis."""
        return self.low - (0.05 + 0.1 * self.has_strip) * (self.high - self.low)

    @property
    def range(self) -> list[float]:
        """The range of the axis, the strips included."""
        return [self.low - 0.1 * (self.high - self.low) * (self.has_strip + self.has_second), self.high]
