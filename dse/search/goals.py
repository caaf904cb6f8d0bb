"""Where on the front a refinement aims: into a wide gap, or at a point that should become better."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dse.design_point import DesignPoint
from dse.pareto import knee_index
from dse.report.units import percent

__all__ = ["FrontPoint", "Goal", "goal"]


@dataclass(frozen=True)
class FrontPoint:
    """A point of the front as refinement sees it.

    Attributes:
        trial: Its number.
        point: Its design point.
        reduction: Share of the parameters that it removes.
        loss: Its first objective that is no cost, turned so that smaller is better.
    """

    trial: int
    point: DesignPoint
    reduction: float
    loss: float


@dataclass(frozen=True)
class Goal:
    """What a refinement is to do.

    Attributes:
        parent: The front point that is changed.
        reduction: Where the changed point should lie.
        words: The same in words.
    """

    parent: FrontPoint
    reduction: float
    words: str


def goal(front: Sequence[FrontPoint], generator: random.Random) -> Goal:
    """Half the time a gap of the front, wide ones more often; else a front point, the knee as often as all others.

    Args:
        front: At least one point that is not dense; the dense model may be among them.
        generator: Decides.
    """
    ordered = sorted(front, key=lambda entry: (entry.reduction, entry.trial))
    changeable = [entry for entry in ordered if not entry.point.is_dense]
    position = _normalised(ordered)
    widths = np.linalg.norm(np.diff(position, axis=0), axis=1)
    if len(ordered) > 1 and widths.any() and generator.random() < 0.5:
        index = generator.choices(range(len(widths)), weights=[float(width) ** 2 for width in widths])[0]
        ends = ordered[index], ordered[index + 1]
        parent = generator.choice([end for end in ends if not end.point.is_dense])
        middle = (ends[0].reduction + ends[1].reduction) / 2
        return Goal(
            parent,
            middle,
            f"to fill a gap of the front between trials {ends[0].trial} and {ends[1].trial}"
            f" (reductions {percent(ends[0].reduction)} and {percent(ends[1].reduction)})",
        )
    eligible = [entry in changeable for entry in ordered]
    knee = knee_index(position, ["minimize", "minimize"], among=eligible)
    if knee is not None and generator.random() < 0.5:
        return Goal(
            ordered[knee], ordered[knee].reduction, f"to improve the knee of the front, trial {ordered[knee].trial}"
        )
    parent = generator.choice(changeable)
    return Goal(parent, parent.reduction, f"to improve trial {parent.trial} of the front")


def _normalised(ordered: Sequence[FrontPoint]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Kept parameters and loss, each over its range on the front; shape (points, 2), smaller is better."""
    values = np.array([[-entry.reduction, entry.loss] for entry in ordered], dtype=np.float64)
    span = np.ptp(values, axis=0)
    result: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (values - values.min(axis=0)) / np.where(
        span > 0, span, 1.0
    )
    return result
