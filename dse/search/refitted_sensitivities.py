"""A model of the divergence of points, fitted to measured points: the additive table, corrected by a few factors.

    D(point) = scale * (sum over units u of  w(u) d(u, option of u))^exponent
    w(u)     = exp(a[kind of u] + piecewise linear b at the depth of u + c if u is removed + d if its width is reduced)

The table's d is measured with one unit changed at a time, so it misses interactions: blocks of one kind, or of one
region of depth, that compensate or amplify each other's errors. The weights w learn these by kind and depth, and the
exponent how divergences combine (1: they add up). All factors are fitted in logarithms, so that they stay positive, by
least squares on the logarithm of the measured divergence. A ridge pulls every factor towards 1, so that with few points
the table stays nearly as measured.

Near the dense model, divergences are as small as their noise (another text, or documents that flip) and may even be
negative; their logarithms would dominate the fit, which then predicts worse than the table alone. An inverse hyperbolic
sine therefore replaces the logarithm: errors count relatively for large divergences, and absolutely below a fraction of
the median divergence.
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
from dse.trial_record import TrialRecord

__all__ = ["KNOTS", "RefittedSensitivities", "observed_divergence", "refit_sensitivities"]

KNOTS = 4
_RIDGE = 0.4  # a factor of e costs as much as an error of 0.4 in the logarithm of one measured divergence
_RIDGE_EXPONENT = 1.0  # non-additive divergences are rarer than units with a larger weight
_RIDGE_SCALE = 0.02  # the scale only converts units: nats on one text to nats, or accuracy, on another
_NOISE = 0.4  # relative to the median divergence: where errors start to count relatively
_FLOOR = 1e-5

_DROPS = ("target_log_likelihood", "choice_probability", "accuracy")

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RefittedSensitivities:
    """A sensitivity table with factors fitted to measured points.

    Attributes:
        table: The table as measured unit by unit.
        kinds: Kinds of units, each with its own factor.
        log_factors: Logarithms of the factors: one per kind, one per knot of depth, one for removal, one for widths;
            shape (kinds + KNOTS + 2,).
        exponent: Exponent of the sum.
        scale: Factor of the result.
        points: Number of measured points in the fit.
        offered: Number of measured points passed to the fit, including those that are not points of the table.
    """

    table: SensitivityTable
    kinds: tuple[str, ...]
    log_factors: FloatArray
    exponent: float = 1.0
    scale: float = 1.0
    points: int = 0
    offered: int = 0

    @classmethod
    def unfitted(cls, table: SensitivityTable) -> RefittedSensitivities:
        """The unchanged table."""
        kinds = tuple(dict.fromkeys(unit.kind for unit in table.units))
        return cls(table, kinds, np.zeros(len(kinds) + KNOTS + 2))

    def weight(self, unit: Unit, option: Option) -> float:
        """The factor on the divergence of one option."""
        return float(math.exp(_features(self, unit, option) @ self.log_factors))

    def corrected_table(self) -> SensitivityTable:
        """The table with its factors, for allocations; scale and exponent do not change the order of points."""
        return self.table.scaled(self.weight)

    def predict(self, point: DesignPoint) -> float:
        """Predicted divergence of a point, in the unit of the measured divergences.

        Raises:
            PointError: The point is not a combination of the table's options.
        """
        options = self.table.options_of(point)
        total = sum(
            max(option.divergence, 0.0) * self.weight(self.table.by_name[name], option)
            for name, option in options.items()
            if not option.is_dense
        )
        return float(self.scale * max(total, _FLOOR) ** self.exponent)

    def expected(self, point: DesignPoint) -> float:
        """As `predict`, but infinite for points that are not combinations of the table's options."""
        try:
            return self.predict(point)
        except PointError:
            return math.inf


def observed_divergence(record: TrialRecord, baseline: TrialRecord | None) -> float | None:
    """The divergence of a trial from the baseline as measured; None if no suitable quantity was measured.

    The first of these that was measured, in order of their signal-to-noise ratio: the KL divergence, the logarithm of
    the perplexity ratio, the drop of the target log-likelihood, of the choice probability, of accuracy. All are 0 for
    the dense model, and all trials of a study have the same one.
    """
    divergence = _measured_value(record, "kl_divergence")
    if divergence is not None:
        return divergence
    if baseline is None:
        return None
    before, after = _measured_value(baseline, "perplexity"), _measured_value(record, "perplexity")
    if before and after:
        return math.log(after / before)
    for name in _DROPS:
        before, after = _measured_value(baseline, name), _measured_value(record, name)
        if before is not None and after is not None:
            return before - after
    return None


def _measured_value(record: TrialRecord, name: str) -> float | None:
    entry = record.quantities.get(name)
    return None if entry is None else entry.value


def refit_sensitivities(
    table: SensitivityTable, points: Sequence[DesignPoint], divergences: Sequence[float]
) -> RefittedSensitivities:
    """Fit the factors to measured points; points that are not combinations of the table's options are left out.

    Args:
        divergences: Measured divergence of each point, in any unit that is 0 for dense; slightly negative values are
            noise.

    Returns:
        The fitted model; the unchanged table if no point has a positive divergence. Deterministic.
    """
    model = RefittedSensitivities.unfitted(table)
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
    return RefittedSensitivities(
        table,
        model.kinds,
        found[:size],
        exponent=math.exp(float(found[size + 1])),
        scale=math.exp(offset + float(found[size])),
        points=len(rows),
        offered=len(points),
    )


def _fitted(rows: Sequence[tuple[FloatArray, FloatArray]], measured: FloatArray, size: int) -> tuple[FloatArray, float]:
    """Fitted logarithms of the factors, of scale / offset, and of the exponent, shape (size + 2,); and the offset."""
    base, features = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    starts = np.cumsum([0, *(len(weights) for weights, _ in rows[:-1])])
    sums = np.maximum(np.add.reduceat(base, starts), _FLOOR)
    is_positive = measured > _FLOOR
    noise = _NOISE * float(np.median(measured[is_positive]))
    target = np.arcsinh(measured / noise)
    # The scale starts at the value that explains the median, so that the ridge does not act on the conversion of units.
    offset = float(np.median(np.log(measured[is_positive] / sums[is_positive])))
    ridge = np.array([*[_RIDGE] * size, _RIDGE_SCALE, _RIDGE_EXPONENT])

    def residuals(parameters: FloatArray) -> FloatArray:
        weighted = np.add.reduceat(base * np.exp(features @ parameters[:size]), starts)
        predicted = np.exp(
            offset + parameters[size] + math.exp(parameters[size + 1]) * np.log(np.maximum(weighted, _FLOOR))
        )
        return np.concatenate([np.arcsinh(predicted / noise) - target, parameters * ridge])

    found: FloatArray = least_squares(residuals, np.zeros(size + 2), method="trf", max_nfev=200).x
    return found, offset


def _row(model: RefittedSensitivities, point: DesignPoint) -> tuple[FloatArray, FloatArray] | None:
    """Divergences of the options that a point takes, shape (n,), and their features, shape (n, factors).

    None if the point is dense or not a combination of the table's options.
    """
    try:
        options = model.table.options_of(point)
    except PointError:
        return None
    taken = [(model.table.by_name[name], option) for name, option in options.items() if not option.is_dense]
    if not taken:
        return None
    base = np.array([max(option.divergence, 0.0) for _, option in taken])
    return base, np.array([_features(model, unit, option) for unit, option in taken])


def _features(model: RefittedSensitivities, unit: Unit, option: Option) -> FloatArray:
    """One-hot kind, hat functions of depth, removal, width; shape (kinds + KNOTS + 2,)."""
    features = np.zeros(len(model.kinds) + KNOTS + 2)
    features[model.kinds.index(unit.kind)] = 1.0
    if unit.layer is not None:
        deepest = max((other.layer or 0) for other in model.table.units)
        place = unit.layer / max(deepest, 1) * (KNOTS - 1)
        hats = np.maximum(0.0, 1.0 - np.abs(np.arange(KNOTS) - place))
        features[len(model.kinds) : len(model.kinds) + KNOTS] = hats
    features[-2:] = float(option.removes_block), float(option.narrows_mlp)
    return features
