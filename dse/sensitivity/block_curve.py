"""Damage of a block between the splits that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["BlockCurve"]

_LEAST = 1e-9  # nats


@dataclass(frozen=True)
class BlockCurve:
    """Corrects the sum of a block's tensor curves by what was measured of the block as one.

    The ratio of measured to predicted divergence is interpolated between measurements, both on logarithmic scales, and held
    beyond them: tensors of a block mend or spoil what the others do, more so the more is taken from them.

    Attributes:
        predicted: Sums of tensor curves at the measured splits, rising.
        measured: Damage of these splits, nats per token.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> BlockCurve:
        """From (predicted, measured) pairs in any order."""
        ordered = sorted((max(p, _LEAST), max(m, _LEAST)) for p, m in pairs)
        return cls(tuple(p for p, _ in ordered), tuple(m for _, m in ordered))

    def at(self, predicted: float) -> float:
        """Damage of a split whose tensor curves add up to `predicted`, nats per token."""
        if not self.predicted:
            return predicted
        at = math.log(max(predicted, _LEAST))
        known, ratios = np.log(self.predicted), np.log(self.measured) - np.log(self.predicted)
        return predicted * math.exp(float(np.interp(at, known, ratios)))
