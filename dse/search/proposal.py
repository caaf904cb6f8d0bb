"""A proposed design point, on its way from a proposer to a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dse.design_point import DesignPoint

__all__ = ["Proposal"]


@dataclass(frozen=True)
class Proposal:
    """A design point to evaluate.

    Attributes:
        levels: Optuna's parameters: the levels of the point or, if `point` is given, the levels nearest to it. The
            sampler learns from these.
        origin: Name of the proposer.
        why: Why the point was proposed, for people.
        point: The design point, if the levels alone do not determine it.
        trial: Number of the trial; None until Optuna has assigned one.
    """

    levels: Mapping[str, int]
    origin: str
    why: str = ""
    point: DesignPoint | None = None
    trial: int | None = None
