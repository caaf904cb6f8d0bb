"""A running study's search: what it proposes first, and who proposes next."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dse.config import SearchParts
from dse.design_point import DesignPoint
from dse.errors import InvalidMeasurementError
from dse.pareto import Objective, directions_of, non_dominated
from dse.study.objectives import objective_values
from dse.study.proposals import first_points
from dse.study.record import EVALUATED_STATES, TrialRecord
from dse.study.search.candidate import Candidate
from dse.study.search.competition import choose
from dse.study.search.goals import FrontPoint
from dse.study.search.origins import Ledger
from dse.study.search.refinement import REFINED, refine
from dse.study.space import SearchSpace

__all__ = ["SearchSession"]

_SAMPLER = "sampler"


@dataclass
class SearchSession:
    """Knows the finished trials and nothing else, so that a resumed study proposes what an uninterrupted one would.

    Attributes:
        space: Of the study.
        objectives: Of the study.
        parts: What is switched on.
        seed: Of the study's sampler.
        trials: Its budget.
        enqueued: The user's own points.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    parts: SearchParts
    seed: int
    trials: int
    enqueued: Sequence[DesignPoint] = ()
    _ledger: Ledger = field(init=False)
    _front: list[tuple[TrialRecord, list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ledger = Ledger(self.objectives)

    def begin(self, reference: Mapping[str, float]) -> None:
        """The dense model is known, and with it the reference of the hypervolume."""
        self._ledger.reference = reference

    def add(self, record: TrialRecord) -> None:
        """A trial is finished."""
        credited = self._ledger.add(record)
        if credited == "repaired" and record.state in EVALUATED_STATES:
            # The sampler's own proposal broke a limit: what its feasible neighbour gains is the sampler's.
            self._ledger.gains[-1] = (_SAMPLER, self._ledger.gains[-1][1])
        if record.state != "complete" or not (record.feasible or not record.point["tensors"]):
            return
        try:
            values = objective_values(self.objectives, record)
        except InvalidMeasurementError:
            return
        self._front.append((record, values))
        kept = non_dominated(np.array([entry for _, entry in self._front]), directions_of(self.objectives))
        self._front = [entry for entry, is_kept in zip(self._front, kept, strict=True) if is_kept]

    def first(self) -> list[Candidate]:
        """What is evaluated after the dense model, in order."""
        found = first_points(
            self.space, self.enqueued, seed=self.seed, trials=self.trials if self.parts.start_up else 0
        )
        return [Candidate(levels, origin) for levels, origin in found]

    def next(self, seen: Collection[str], generator: random.Random) -> Candidate | None:
        """The next point, where somebody beside the sampler has earned its turn; None is the sampler's turn.

        Args:
            seen: Ids of points that were evaluated.
            generator: Seeded by the study's seed and the evaluations so far.
        """
        if not self.parts.refinement or choose(self._ledger.gains, (_SAMPLER, REFINED), generator) == _SAMPLER:
            return None
        return refine(self.space, self._front_points(), seen, generator)

    def _front_points(self) -> list[FrontPoint]:
        quality = next((index for index, o in enumerate(self.objectives) if not o.is_cost), 0)
        sign = self.objectives[quality].sign
        return [
            FrontPoint(
                record.trial,
                DesignPoint.from_json(record.point, self.space.topology),
                record.cost["reduction"],
                sign * values[quality],
            )
            for record, values in self._front
        ]
