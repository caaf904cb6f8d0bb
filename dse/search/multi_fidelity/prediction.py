"""Predict what was not measured from what is cheap, with an interval that says how well: least squares, arrays only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dse.evaluation.statistics.intervals import student_quantile

__all__ = ["FEWEST_POINTS", "Prediction", "linear_prediction"]

FEWEST_POINTS = 6
"""Below this nothing is predicted: an interval with three degrees of freedom or fewer is too wide to stop anybody."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """A value not measured, with the interval that a measurement of it would fall into."""

    value: float
    low: float
    high: float


def linear_prediction(
    features: FloatArray, values: FloatArray, at: FloatArray, confidence: float, *, slope_sign: int = 0
) -> Prediction | None:
    """Value at a new place by ordinary least squares, with its prediction interval (not that of the mean).

    Args:
        features: Shape (n, k).
        values: Shape (n,).
        at: Shape (k,).
        confidence: Two-sided, of the interval.
        slope_sign: For one feature, the only sign of the slope that makes sense; where the fit has the other, the
            feature is taken to say nothing, and the values' own spread is the interval. 0 lets any sign be.

    Returns:
        None where fewer than `FEWEST_POINTS` points are known, or too few for the features.

    Source: Draper and Smith (1998), Applied Regression Analysis, section 1.4 and chapter 5.
    """
    count, width = features.shape
    if count < max(FEWEST_POINTS, width + 4):
        return None
    # Features of any unit: parameters are counted in 1e8, divergences in nats.
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    design = np.column_stack([np.ones(count), (features - centre) / scale])
    place = np.concatenate([[1.0], (at - centre) / scale])
    coefficients, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    if slope_sign and width == 1 and coefficients[1] * slope_sign <= 0:
        design, place, coefficients, rank = design[:, :1], place[:1], np.array([values.mean()]), 1
    degrees = count - int(rank)
    residual = values - design @ coefficients
    spread = math.sqrt(float(residual @ residual) / degrees)
    leverage = float(place @ np.linalg.pinv(design.T @ design) @ place)
    half = student_quantile((1 + confidence) / 2, degrees) * spread * math.sqrt(1.0 + leverage)
    value = float(place @ coefficients)
    return Prediction(value, value - half, value + half)
