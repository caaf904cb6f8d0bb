"""A second look at stopped trials when the search is over.

A trial is judged by what is known when its turn comes. Early on that is little: the line that predicts accuracy from
the proxy goes through a handful of trials. At the end more is known, and the stopped trial of most promise is worth
more than another new one: its climb begins where it ended. So the search can afford to stop early, and be generous at
the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.trial_record import TrialRecord

__all__ = ["most_promising", "resume_stopped_trials"]


def most_promising(judge: EarlyStopping, stopped: Sequence[TrialRecord], min_gain: float) -> TrialRecord | None:
    """The stopped trial expected to add most to the front; None where none is expected to add `min_gain`."""
    promises = [judge.promise(record) if record.feasible else 0.0 for record in stopped]
    best = max(range(len(stopped)), key=lambda index: promises[index], default=None)
    return None if best is None or promises[best] < min_gain else stopped[best]


def resume_stopped_trials(
    stopped: Sequence[TrialRecord],
    judge: Callable[[], EarlyStopping],
    climb_on: Callable[[TrialRecord, EarlyStopping], None],
    min_gain: float,
) -> None:
    """Have stopped trials climb on, the most promising first, while one is expected to add enough.

    Args:
        stopped: Trials that the ladder stopped.
        judge: Makes a judge of all that is known now.
        climb_on: Evaluates a trial as far as the judge lets it.
        min_gain: Share of the front's hypervolume.
    """
    waiting = list(stopped)
    while waiting:
        judging = judge()
        best = most_promising(judging, waiting, min_gain)
        if best is None:
            return
        waiting.remove(best)
        climb_on(best, judging)
