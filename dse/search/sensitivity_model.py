"""The divergence of points as learnt from the measured ones: the additive table, corrected by a few factors.

    D(point) = scale * (sum over units u of  w(u) d(u, option of u))^exponent
    w(u)     = exp(a[kind of u] + piecewise linear b at the depth of u + c if the unit is removed)

d is measured with one unit changed at a time. What such a table misses is how divergences meet: blocks of one kind, or of
one region of depth, that repair or worsen each other's loss. The weights w learn that by kind and depth, and the
exponent how fast losses grow together (1: they add up). All are fitted in logarithms, so that they stay positive, by
least squares on the logarithm of the measured divergence, with a ridge that pulls every factor towards 1: with few points
the table stays as it was measured.

Near the dense model divergences are of the size of their noise (another text, or documents that flip), may even be
negative, and their logarithms would decide the fit: on real studies it then predicts worse than the table alone. So the
logarithm is an inverse hyperbolic sine: errors count relatively for large divergences, absolutely below a part of the
median one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from dse.design_point import DesignPoint
from dse.errors import PointError
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["KNOTS", "RefittedDamage", "refit"]

KNOTS = 4
_RIDGE = 0.4  # a factor of e weighs like an error of 0.4 in the logarithm of one measured divergence
_RIDGE_EXPONENT = 1.0  # losses that do not add up are rarer than units that weigh more
_RIDGE_SCALE = 0.02  # the scale only translates units: nats on one text to nats, or accuracy, on another
_NOISE = 0.4  # of the median divergence: where errors begin to count relatively
_FLOOR = 1e-5

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RefittedDamage:
    """A divergence table with factors learnt from measured points.

    Attributes:
        table: As measured unit by unit.
        kinds: Kinds of units that have a factor each.
        log_factors: Logarithms: one per kind, one per knot of depth, one for removal; shape (kinds + KNOTS + 1,).
        exponent: Of the sum.
        scale: Of the result.
        points: Measured points that it was fitted to.
        offered: Measured points that it was offered, those that the table has no options for included.
    """

    table: SensitivityTable
    kinds: tuple[str, ...]
    log_factors: FloatArray
    exponent: float = 1.0
    scale: float = 1.0
    points: int = 0
    offered: int = 0

    @classmethod
    def of(cls, table: SensitivityTable) -> RefittedDamage:
        """The table as it is."""
        kinds = tuple(dict.fromkeys(unit.kind for unit in table.units))
        return cls(table, kinds, np.zeros(len(kinds) + KNOTS + 1))

    def weight(self, unit: Unit, option: Option) -> float:
        """The factor on the divergence of one option."""
        return float(math.exp(_features(self, unit, option) @ self.log_factors))

    def corrected_table(self) -> SensitivityTable:
        """The table with its factors: what allocations are made from (scale and exponent change no order)."""
        return self.table.scaled(self.weight)

    def predict(self, point: DesignPoint) -> float:
        """Expected divergence of a point, in the unit of what was measured.

        Raises:
            PointError: The point holds something that is no option of the table.
        """
        options = self.table.options_of(point)
        total = sum(
            max(option.divergence, 0.0) * self.weight(self.table.by_name[name], option)
            for name, option in options.items()
            if not option.is_dense
        )
        return float(self.scale * max(total, _FLOOR) ** self.exponent)

    def expected(self, point: DesignPoint) -> float:
        """As `predict`; infinite where the table cannot say."""
        try:
            return self.predict(point)
        except PointError:
            return math.inf


def refit(table: SensitivityTable, points: Sequence[DesignPoint], divergences: Sequence[float]) -> RefittedDamage:
    """Fit the factors to measured points; those the table has no options for are left out.

    Args:
        table: As measured unit by unit.
        points: Measured, in order.
        divergences: What each cost, in any unit that is 0 for dense; same length. Slightly negative ones are noise.

    Returns:
        The refitted model; without a point that lost something the table as it is. The same points give the same
        factors.
    """
    model = RefittedDamage.of(table)
    rows, measured = [], []
    for point, divergence in zip(points, divergences, strict=True):
        row = _row(model, point) if math.isfinite(divergence) else None
        if row is not None:
            rows.append(row)
            measured.append(divergence)
    if not measured or max(measured) <= _FLOOR:
        return replace(model, offered=len(points))
    size = len(model.log_factors)
    found, offset = _fitted(rows, np.array(measured), size)
    return RefittedDamage(
        table,
        model.kinds,
        found[:size],
        exponent=math.exp(float(found[size + 1])),
        scale=math.exp(offset + float(found[size])),
        points=len(rows),
        offered=len(points),
    )


def _fitted(rows: Sequence[tuple[FloatArray, FloatArray]], measured: FloatArray, size: int) -> tuple[FloatArray, float]:
    """Logarithms of the factors, of the scale beyond the offset, and of the exponent, shape (size + 2,); the offset."""
    base, features = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    starts = np.cumsum([0, *(len(weights) for weights, _ in rows[:-1])])
    sums = np.maximum(np.add.reduceat(base, starts), _FLOOR)
    has_lost = measured > _FLOOR
    noise = _NOISE * float(np.median(measured[has_lost]))
    target = np.arcsinh(measured / noise)
    # The scale begins at what explains the median, so that the ridge has units to forget but no offset to fight.
    offset = float(np.median(np.log(measured[has_lost] / sums[has_lost])))
    ridge = np.array([*[_RIDGE] * size, _RIDGE_SCALE, _RIDGE_EXPONENT])

    def residuals(parameters: FloatArray) -> FloatArray:
        weighted = np.add.reduceat(base * np.exp(features @ parameters[:size]), starts)
        predicted = np.exp(
            offset + parameters[size] + math.exp(parameters[size + 1]) * np.log(np.maximum(weighted, _FLOOR))
        )
        return np.concatenate([np.arcsinh(predicted / noise) - target, parameters * ridge])

    found: FloatArray = least_squares(residuals, np.zeros(size + 2), method="trf", max_nfev=200).x
    return found, offset


def _row(model: RefittedDamage, point: DesignPoint) -> tuple[FloatArray, FloatArray] | None:
    """Divergences of the options that a point takes, shape (n,), and their features, shape (n, factors)."""
    try:
        options = model.table.options_of(point)
    except PointError:
        return None
    taken = [(model.table.by_name[name], option) for name, option in options.items() if not option.is_dense]
    if not taken:
        return None
    base = np.array([max(option.divergence, 0.0) for _, option in taken])
    return base, np.array([_features(model, unit, option) for unit, option in taken])


def _features(model: RefittedDamage, unit: Unit, option: Option) -> FloatArray:
    """One-hot kind, hat functions of depth, removal; shape (kinds + KNOTS + 1,)."""
    features = np.zeros(len(model.kinds) + KNOTS + 1)
    features[model.kinds.index(unit.kind)] = 1.0
    if unit.layer is not None:
        deepest = max((other.layer or 0) for other in model.table.units)
        place = unit.layer / max(deepest, 1) * (KNOTS - 1)
        hats = np.maximum(0.0, 1.0 - np.abs(np.arange(KNOTS) - place))
        features[len(model.kinds) : len(model.kinds) + KNOTS] = hats
    features[-1] = float(option.removes_block)
    return features
