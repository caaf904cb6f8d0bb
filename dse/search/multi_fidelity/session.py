"""Multi-fidelity evaluation over a study: complete trials, early stopping, and resuming stopped trials at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dse.config import FidelityConfig
from dse.evaluation.result import EvaluationResult
from dse.pareto import Objective
from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.trial_record import EvaluatedTrial, TrialRecord

__all__ = ["MultiFidelitySession"]


@dataclass
class MultiFidelitySession:
    """Keeps the complete trials of a running study and decides by them.

    Attributes:
        config: None disables early stopping.
        objectives: The study's objectives.
        read_evaluation: Reads the stored evaluation of a trial by its number.
    """

    config: FidelityConfig | None
    objectives: Sequence[Objective]
    read_evaluation: Callable[[int], EvaluationResult]
    _complete: dict[int, EvaluatedTrial] = field(default_factory=dict)

    def add(self, record: TrialRecord, evaluation: EvaluationResult | None = None) -> None:
        """Add a finished trial; a complete one competes with all later ones."""
        if self.config is None or record.state != "complete":
            return
        if evaluation is None and record.tasks:
            evaluation = self.read_evaluation(record.trial)
        self._complete[record.trial] = EvaluatedTrial(record, evaluation)

    def early_stopping(self, baseline: EvaluatedTrial | None) -> EarlyStopping | None:
        """The rule for the next trial; None for the baseline itself and without multi-fidelity evaluation."""
        if self.config is None or baseline is None:
            return None
        return self._rule(baseline, self.config.min_gain)

    @property
    def resumes_stopped(self) -> bool:
        """Whether stopped trials may continue at the end of the study."""
        return self.config is not None and self.config.resume_stopped is not None

    def resume_stopped_trials(
        self,
        stopped: Sequence[TrialRecord],
        baseline: EvaluatedTrial,
        resume: Callable[[TrialRecord, EarlyStopping], None],
    ) -> None:
        """Continue stopped trials, the most promising first, while one is expected to add enough.

        A trial is stopped by what is known at the time, which is little early in a study: the line that predicts
        accuracy from the proxy goes through a handful of trials. At the end more is known, and the most promising
        stopped trial is worth more than a new one, since it resumes where it stopped. So the search can stop trials
        early.

        Args:
            resume: Evaluates a trial further, and calls `add` with a trial that is complete then.
        """
        if self.config is None or self.config.resume_stopped is None:
            return
        min_gain, waiting = self.config.resume_stopped, list(stopped)
        while waiting:
            rule = self._rule(baseline, min_gain)
            promises = [rule.promise(record) if record.feasible else 0.0 for record in waiting]
            best = waiting[promises.index(max(promises))]
            if max(promises) < min_gain:
                return
            waiting.remove(best)
            resume(best, rule)

    def _rule(self, baseline: EvaluatedTrial, min_gain: float) -> EarlyStopping:
        return EarlyStopping(self.objectives, baseline, list(self._complete.values()), min_gain)

    def sampler_values(self, record: TrialRecord) -> list[float]:
        """Values that the sampler receives for a stopped trial: the estimates at the rung where it was stopped."""
        return [record.estimates[objective.name].value for objective in self.objectives]
