"""A running study's search: what it proposes first, and who proposes next."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dse.config import SearchParts
from dse.design_point import DesignPoint
from dse.errors import InvalidMeasurementError
from dse.pareto import Objective, directions_of, non_dominated
from dse.search.bandit import choose
from dse.search.candidate import Candidate
from dse.search.goals import FrontPoint, goal
from dse.search.latency_forecast import LatencyForecast
from dse.search.observed_divergence import observed_divergence
from dse.search.origins import Ledger
from dse.search.refinement import REFINED, refine
from dse.search.sensitivity_model import RefittedDamage, refit
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.search.start_up_points import first_points
from dse.search.warm_starts import ALLOCATION, allocated, allocated_in_time, candidate_of, warm_starts
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.study.objectives import objective_values
from dse.trial_record import EVALUATED_STATES, TrialRecord

__all__ = ["ENQUEUED", "SearchSession"]

_SAMPLER, ENQUEUED = "sampler", "enqueued"
_GOALS = 4
_LEAST_MEASURED = 4


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
        divergences: Measured at set-up; None where the search starts without a profile.
        forecast: Predicts a latency; None where the study predicts none.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    parts: SearchParts
    seed: int
    trials: int
    enqueued: Sequence[DesignPoint] = ()
    divergences: SensitivityTable | None = None
    forecast: LatencyForecast | None = None
    _dense: TrialRecord | None = None
    _measured: list[tuple[DesignPoint, float]] = field(default_factory=list)
    _model: RefittedDamage | None = None
    _ledger: Ledger = field(init=False)
    _front: list[tuple[TrialRecord, list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ledger = Ledger(self.objectives)
        self._learn()

    def begin(self, reference: Mapping[str, float], dense: TrialRecord | None = None) -> None:
        """The dense model is known, and with it the reference of the hypervolume and what latencies are told from."""
        self._ledger.reference = reference
        if self.forecast is not None and self.divergences is not None and dense is not None:
            self.divergences, self._model = self.forecast.table(self.divergences, dense), None
            self._learn()

    @property
    def _most_latency_s(self) -> float | None:
        """The limit that allocations keep; None where there is none or the table predicts no latencies."""
        is_predicted = self.divergences is not None and self.divergences.latency_dense_s is not None
        return self.forecast.most_s if self.forecast is not None and is_predicted else None

    def add(self, record: TrialRecord) -> None:
        """A trial is finished."""
        credited = self._ledger.add(record)
        if credited == "repaired" and record.state in EVALUATED_STATES:
            # The sampler's own proposal broke a limit: what its feasible neighbour gains is the sampler's.
            self._ledger.gains[-1] = (_SAMPLER, self._ledger.gains[-1][1])
        self._observe(record)
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
        is_warm = self.divergences is not None and self.parts.warm_starts
        start_up = self.trials if self.parts.start_up and not is_warm else 0
        found = [
            Candidate(levels, origin)
            for levels, origin in first_points(self.space, (), seed=self.seed, trials=start_up)
        ]
        if self.divergences is not None and is_warm:
            found = warm_starts(self.space, self.divergences, self.trials, self._most_latency_s)
        seen, kept = {DesignPoint.dense().id}, []
        for candidate in [*map(self.own, self.enqueued), *found]:
            point = candidate.point or self.space.point(candidate.levels)
            if point.id not in seen:
                seen.add(point.id)
                kept.append(candidate)
        return kept

    def own(self, point: DesignPoint) -> Candidate:
        """A point of the user's as a candidate; what the sampler hears of it is said where it is not the point."""
        found = candidate_of(self.space, point, ENQUEUED, "")
        if found.point is None:
            return replace(found, point=point) if self.decides_points else found
        words = f"beside the levels of space '{self.space.config.name}': the sampler is told the nearest ones"
        return replace(found, why=words)

    def next(self, seen: Collection[str], generator: random.Random) -> Candidate | None:
        """The next point, where somebody beside the sampler has earned its turn; None is the sampler's turn.

        Args:
            seen: Ids of points that were evaluated.
            generator: Seeded by the study's seed and the evaluations so far.
        """
        self._learn()
        origins = [_SAMPLER]
        origins += [REFINED] if self.parts.refinement else []
        origins += [ALLOCATION] if self.parts.refit and self._model is not None else []
        chosen = choose(self._ledger.gains, origins, generator)
        if chosen == REFINED:
            return self._refined(seen, generator)
        return self._allocated(seen, generator) if chosen == ALLOCATION else None

    @property
    def decides_points(self) -> bool:
        """Whether the point of given levels depends on what was learnt, so that it must be kept when it is proposed."""
        return isinstance(self.space, DepthProfileSpace)

    def _observe(self, record: TrialRecord) -> None:
        if record.state != "complete":
            return
        if not record.point["tensors"]:
            self._dense = self._dense or record
            return
        divergence = observed_divergence(record, self._dense)
        if divergence is not None:
            self._measured.append((DesignPoint.from_json(record.point, self.space.topology), divergence))

    def _learn(self) -> None:
        """Refit the divergences to all that was measured so far, and give them to a space that allocates by them."""
        if self.divergences is None:
            return
        is_refitted = self.parts.refit and len(self._measured) >= _LEAST_MEASURED
        if self._model is not None and (not is_refitted or self._model.offered == len(self._measured)):
            return
        points, values = ([], []) if not is_refitted else zip(*self._measured, strict=True)
        self._model = refit(self.divergences, list(points), list(values))
        if isinstance(self.space, DepthProfileSpace):
            self.space = self.space.with_table(self._model.corrected_table())

    def _refined(self, seen: Collection[str], generator: random.Random) -> Candidate | None:
        model = self._model
        divergence = None if model is None else model.expected
        if not isinstance(self.space, DepthProfileSpace):
            return refine(self.space, self._front_points(), seen, generator, divergence)
        found = refine(self.space.grid, self._front_points(), seen, generator, divergence)
        if found is None:
            return None
        return candidate_of(self.space, self.space.grid.point(found.levels), found.origin, found.why)

    def _allocated(self, seen: Collection[str], generator: random.Random) -> Candidate | None:
        """The allocation over the refitted divergences where a goal on the front points to."""
        front = self._front_points()
        if self._model is None or all(entry.point.is_dense for entry in front):
            return None
        table, refitted = self._model.corrected_table(), f"refitted to {self._model.points} measured points"
        for _ in range(_GOALS):
            aim = goal(front, generator)
            share = aim.reduction + generator.uniform(-0.005, 0.005)
            # Where time is an objective, half of the proposals save a share of it instead of a share of the parameters.
            if table.latency_dense_s is not None and generator.random() < 0.5:
                found = allocated_in_time(self.space, table, share, self._most_latency_s)
            else:
                point = allocated(self.space, table, share, self._most_latency_s)
                found = None if point is None else (point, "there")
            if found is not None and found[0].id not in seen:
                words = f"{aim.words}: the least divergence in sum {found[1]}, {refitted}"
                return candidate_of(self.space, found[0], ALLOCATION, words)
        return None

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
