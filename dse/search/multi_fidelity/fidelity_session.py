"""A running study's side of the ladder: who is established, who judges, what the sampler hears, and the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dse.config import FidelityConfig
from dse.evaluation import EvaluationResult
from dse.pareto import Objective
from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.search.multi_fidelity.established import Established
from dse.search.multi_fidelity.resume_stopped import resume_stopped_trials
from dse.search.multi_fidelity.stopped_trials import Told, told
from dse.study.point_run import Reference
from dse.trial_record import TrialRecord

__all__ = ["MultiFidelitySession"]


@dataclass
class MultiFidelitySession:
    """Keeps the evaluations of the trials at the top rung, and makes a judge for each new trial.

    Attributes:
        config: None without a ladder: then nobody judges.
        objectives: Of the study.
        read_evaluation: An earlier run's evaluation by trial number.
    """

    config: FidelityConfig | None
    objectives: Sequence[Objective]
    read_evaluation: Callable[[int], EvaluationResult]
    _established: dict[int, Established] = field(default_factory=dict)

    def add(self, record: TrialRecord, evaluation: EvaluationResult | None = None) -> None:
        """A trial is finished; one at the top rung is a rival of those to come."""
        if self.config is None or record.state != "complete":
            return
        if evaluation is None and record.tasks:
            evaluation = self.read_evaluation(record.trial)
        self._established[record.trial] = Established(record, evaluation)

    def judge(self, reference: Reference | None) -> EarlyStopping | None:
        """Who stops the next trial; None for the dense model, and without a ladder."""
        if self.config is None or reference is None:
            return None
        return self._judge(reference, self.config.min_gain)

    def resume_stopped_trials(
        self,
        stopped: Sequence[TrialRecord],
        reference: Reference,
        climb_on: Callable[[TrialRecord, EarlyStopping], None],
    ) -> None:
        """Have stopped trials climb on, now that more is known; `climb_on` adds those that come to the top."""
        if self.config is not None and self.config.resume_stopped is not None:
            min_gain = self.config.resume_stopped
            resume_stopped_trials(stopped, lambda: self._judge(reference, min_gain), climb_on, min_gain)

    @property
    def has_second_look(self) -> bool:
        """Whether stopped trials may climb on at the end."""
        return self.config is not None and self.config.resume_stopped is not None

    def _judge(self, reference: Reference, min_gain: float) -> EarlyStopping:
        dense = Established(reference.record, reference.evaluation)
        return EarlyStopping(self.objectives, dense, list(self._established.values()), min_gain)

    def told(self, record: TrialRecord, violations: Mapping[str, float]) -> Told:
        """What the sampler hears of a stopped trial."""
        return told(
            FidelityConfig().tell if self.config is None else self.config.tell, self.objectives, record, violations
        )
