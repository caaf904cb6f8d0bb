"""A second look at stopped trials when the search is over.

A trial is judged by what is known when its turn comes. Early on that is little: the line that predicts accuracy from
the proxy goes through a handful of trials. At the end more is known, and the stopped trial of most promise is worth
more than another new one: its climb begins where it ended. So the search can afford to stop early, and be generous at
the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dse.study.fidelity.judge import Judge
from dse.study.record import TrialRecord

__all__ = ["look_again", "most_promising"]


def most_promising(judge: Judge, stopped: Sequence[TrialRecord], least_gain: float) -> TrialRecord | None:
    """The stopped trial expected to add most to the front; None where none is expected to add `least_gain`."""
    promises = [judge.promise(record) if record.feasible else 0.0 for record in stopped]
    best = max(range(len(stopped)), key=lambda index: promises[index], default=None)
    return None if best is None or promises[best] < least_gain else stopped[best]


def look_again(
    stopped: Sequence[TrialRecord],
    judge: Callable[[], Judge],
    climb_on: Callable[[TrialRecord, Judge], None],
    least_gain: float,
) -> None:
    """Have stopped trials climb on, the most promising first, while one is expected to add enough.

    Args:
        stopped: Trials that the ladder stopped.
        judge: Makes a judge of all that is known now.
        climb_on: Evaluates a trial as far as the judge lets it.
        least_gain: Share of the front's hypervolume.
    """
    waiting = list(stopped)
    while waiting:
        judging = judge()
        best = most_promising(judging, waiting, least_gain)
        if best is None:
            return
        waiting.remove(best)
        climb_on(best, judging)
