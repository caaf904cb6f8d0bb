"""The search of a running study: the points it starts from, and a bandit over proposers for the next point."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dse.config import SearchParts
from dse.design_point import DesignPoint
from dse.errors import InvalidMeasurementError
from dse.pareto import Objective, directions_of, non_dominated
from dse.search.latency_forecast import LatencyForecast
from dse.search.origins import Ledger, choose_proposer
from dse.search.proposal import Proposal
from dse.search.refinement import REFINED, FrontPoint, draw_goal, refine
from dse.search.refitted_sensitivities import RefittedSensitivities, observed_divergence, refit_sensitivities
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.search.start_up_points import first_points
from dse.search.warm_starts import ALLOCATION, allocated_for_latency, allocated_point, proposal_of, warm_starts
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.trial_record import EVALUATED_STATES, TrialRecord, objective_values

__all__ = ["ENQUEUED", "SearchSession"]

_SAMPLER, ENQUEUED = "sampler", "enqueued"
_GOALS = 4
_MIN_MEASURED = 4


@dataclass
class SearchSession:
    """Proposes points from the finished trials alone, so that a resumed study proposes what an undisturbed one would.

    Attributes:
        space: The search space; a depth-profile space follows the refitted sensitivities.
        objectives: The study's objectives.
        parts: The proposers that are switched on.
        seed: The sampler's seed.
        trials: The study's budget.
        enqueued: The user's own points.
        table: The sensitivity table measured at set-up; None without a sensitivity profile.
        forecast: Predicts a latency objective; None if the study predicts none.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    parts: SearchParts
    seed: int
    trials: int
    enqueued: Sequence[DesignPoint] = ()
    table: SensitivityTable | None = None
    forecast: LatencyForecast | None = None
    _baseline: TrialRecord | None = None
    _measured: list[tuple[DesignPoint, float]] = field(default_factory=list)
    _model: RefittedSensitivities | None = None
    _ledger: Ledger = field(init=False)
    _front: list[tuple[TrialRecord, list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ledger = Ledger(self.objectives)
        self._learn()

    def begin(self, reference: Mapping[str, float], baseline: TrialRecord | None = None) -> None:
        """Start once the baseline is measured.

        Args:
            reference: Objective to its value at the reference point of the hypervolume.
            baseline: The dense model's record, from which latencies are predicted.
        """
        self._ledger.reference = reference
        if self.forecast is not None and self.table is not None and baseline is not None:
            self.table, self._model = self.forecast.table(self.table, baseline), None
            self._learn()

    @property
    def _max_latency_s(self) -> float | None:
        """The limit on predicted latency; None without one."""
        is_predicted = self.table is not None and self.table.latency_dense_s is not None
        return self.forecast.max_s if self.forecast is not None and is_predicted else None

    def add(self, record: TrialRecord) -> None:
        """Add a finished trial."""
        credited = self._ledger.add(record)
        if credited == "repaired" and record.state in EVALUATED_STATES:
            # The sampler's own proposal broke a limit: the gain of its feasible neighbour is credited to the sampler.
            self._ledger.gains[-1] = (_SAMPLER, self._ledger.gains[-1][1])
        if record.state != "complete":
            return
        if record.is_dense:
            self._baseline = self._baseline or record
        elif (divergence := observed_divergence(record, self._baseline)) is not None:
            self._measured.append((record.point, divergence))
        if not (record.feasible or record.is_dense):
            return
        try:
            values = objective_values(self.objectives, record)
        except InvalidMeasurementError:
            return
        self._front.append((record, values))
        kept = non_dominated(np.array([entry for _, entry in self._front]), directions_of(self.objectives))
        self._front = [entry for entry, is_kept in zip(self._front, kept, strict=True) if is_kept]

    def first(self) -> list[Proposal]:
        """The points to evaluate after the baseline, in order: the user's, then warm starts or start-up points."""
        is_warm = self.table is not None and self.parts.warm_starts
        start_up = self.trials if self.parts.start_up and not is_warm else 0
        found = [
            Proposal(levels, origin) for levels, origin in first_points(self.space, (), seed=self.seed, trials=start_up)
        ]
        if self.table is not None and is_warm:
            found = warm_starts(self.space, self.table, self.trials, self._max_latency_s)
        seen, kept = {DesignPoint.dense().id}, []
        for proposal in [*map(self.user_proposal, self.enqueued), *found]:
            point = proposal.point or self.space.point(proposal.levels)
            if point.id not in seen:
                seen.add(point.id)
                kept.append(proposal)
        return kept

    def user_proposal(self, point: DesignPoint) -> Proposal:
        """A user's point as a proposal."""
        found = proposal_of(self.space, point, ENQUEUED, "")
        if found.point is None:
            return replace(found, point=point) if self.decides_points else found
        why = f"outside the levels of space '{self.space.config.name}': the sampler receives the nearest levels"
        return replace(found, why=why)

    def next(self, seen: Collection[str], generator: random.Random) -> Proposal | None:
        """The next point from a proposer other than the sampler; None if it is the sampler's turn.

        Args:
            seen: Ids of evaluated points.
            generator: Seeded by the study's seed and the number of evaluated trials.
        """
        self._learn()
        proposers = [_SAMPLER]
        proposers += [REFINED] if self.parts.refinement else []
        proposers += [ALLOCATION] if self.parts.refit and self._model is not None else []
        chosen = choose_proposer(self._ledger.gains, proposers, generator)
        if chosen == REFINED:
            return self._refined(seen, generator)
        return self._allocated(seen, generator) if chosen == ALLOCATION else None

    @property
    def decides_points(self) -> bool:
        """Whether the point of given levels depends on the trials so far, so that it must be stored when proposed."""
        return isinstance(self.space, DepthProfileSpace)

    def _learn(self) -> None:
        """Refit the sensitivities to all measured points, and pass them to a space that allocates by them."""
        if self.table is None:
            return
        is_refitted = self.parts.refit and len(self._measured) >= _MIN_MEASURED
        if self._model is not None and (not is_refitted or self._model.offered == len(self._measured)):
            return
        points, values = ([], []) if not is_refitted else zip(*self._measured, strict=True)
        self._model = refit_sensitivities(self.table, list(points), list(values))
        if isinstance(self.space, DepthProfileSpace):
            self.space = self.space.with_table(self._model.corrected_table())

    def _refined(self, seen: Collection[str], generator: random.Random) -> Proposal | None:
        expected = None if self._model is None else self._model.expected
        if not isinstance(self.space, DepthProfileSpace):
            return refine(self.space, self._front_points(), seen, generator, expected)
        found = refine(self.space.grid, self._front_points(), seen, generator, expected)
        if found is None:
            return None
        return proposal_of(self.space, self.space.grid.point(found.levels), found.origin, found.why)

    def _allocated(self, seen: Collection[str], generator: random.Random) -> Proposal | None:
        """An allocation over the refitted sensitivities, at the reduction of a goal on the front."""
        front = self._front_points()
        if self._model is None or all(entry.point.is_dense for entry in front):
            return None
        table, refitted = self._model.corrected_table(), f"refitted to {self._model.points} measured points"
        for _ in range(_GOALS):
            goal = draw_goal(front, generator)
            share = goal.reduction + generator.uniform(-0.005, 0.005)
            # With a latency objective, half of the allocations save a share of the time instead of the parameters.
            if table.latency_dense_s is not None and generator.random() < 0.5:
                found = allocated_for_latency(self.space, table, share, self._max_latency_s)
            else:
                point = allocated_point(self.space, table, share, self._max_latency_s)
                found = None if point is None else (point, "at this reduction")
            if found is not None and found[0].id not in seen:
                why = f"{goal.why}: least expected divergence {found[1]}, {refitted}"
                return proposal_of(self.space, found[0], ALLOCATION, why)
        return None

    def _front_points(self) -> list[FrontPoint]:
        quality = next((index for index, o in enumerate(self.objectives) if not o.is_cost), 0)
        sign = self.objectives[quality].sign
        return [
            FrontPoint(record.trial, record.point, record.cost["reduction"], sign * values[quality])
            for record, values in self._front
        ]
