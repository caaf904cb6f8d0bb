"""What a running study tells whoever watches it; the command line draws it, a notebook may ignore it."""

from __future__ import annotations

from dataclasses import dataclass

from dse.trial_record import TrialRecord

__all__ = ["StudyListener", "StudyProgress"]


@dataclass(frozen=True)
class StudyProgress:
    """Where a study stands.

    Attributes:
        finished: Evaluated trials (dense and failed ones included).
        total: The budget.
        front_size: Points on the front, dense not counted unless it is on it.
        hypervolume: Normalised to [0, 1]; None before the dense model is measured.
        seconds_left: Estimate from the trials so far; None before the first.
    """

    finished: int
    total: int
    front_size: int = 0
    hypervolume: float | None = None
    seconds_left: float | None = None


class StudyListener:
    """Hears of everything; override what matters. The base class ignores it all."""

    def on_message(self, message: str) -> None:
        """A sentence for people: what was dropped, resumed, or is being loaded."""

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """Work within set-up or within a trial: `evaluate dse_facts` 40 of 200."""

    def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
        """A point is about to be evaluated."""

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        """A trial is finished and stored."""
