"""Least-squares prediction of an expensive quantity from cheap features, with a prediction interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

__all__ = ["FEWEST_POINTS", "Prediction", "linear_prediction"]

FEWEST_POINTS = 6
"""Minimum number of known points: with three degrees of freedom or fewer the interval is too wide to stop any trial."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """A predicted value with its prediction interval."""

    value: float
    low: float
    high: float


def linear_prediction(
    features: FloatArray, values: FloatArray, at: FloatArray, confidence: float, *, slope_sign: int = 0
) -> Prediction | None:
    """Predict the value at a new point by ordinary least squares.

    Args:
        features: Shape (n, k).
        values: Shape (n,).
        at: Shape (k,).
        confidence: Two-sided confidence of the prediction interval.
        slope_sign: The only plausible sign of the slope, for a single feature. If the fit has the other sign, the
            feature is ignored and the interval follows from the spread of the values. 0 allows both signs.

    Returns:
        None if fewer than `FEWEST_POINTS` points are known, or too few for the number of features.

    Source: Draper and Smith (1998), Applied Regression Analysis, section 1.4 and chapter 5.
    """
    count, width = features.shape
    if count < max(FEWEST_POINTS, width + 4):
        return None
    # Features have very different scales: parameters are of the order of 1e8, divergences of 1e-2.
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
    half = float(student_t.ppf((1 + confidence) / 2, degrees)) * spread * math.sqrt(1.0 + leverage)
    value = float(place @ coefficients)
    return Prediction(value, value - half, value + half)
