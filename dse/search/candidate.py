"""A point that somebody beside the sampler proposes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dse.design_point import DesignPoint

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """A proposal on its way to the queue.

    Attributes:
        levels: What the sampler learns from: the point's levels, or the nearest ones.
        origin: Who proposes it.
        why: Why, in words for people.
        point: The point, where the levels alone do not say it.
    """

    levels: Mapping[str, int]
    origin: str
    why: str = ""
    point: DesignPoint | None = None
