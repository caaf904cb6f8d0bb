"""The end of a study: the whole front is evaluated again, on documents that the search never saw.

Every front point has been evaluated on all documents of the search; asking the same documents again would say the same.
But a front is picked by what it scored there, so some of it sits there by luck. Fresh documents have no such bias. What
they say replaces the accuracy of a front point; who then leaves the front makes room for others, which are evaluated in
their turn, until the front holds only points that fresh documents have confirmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dse.decomposition import FactorBank, decompose
from dse.design_point import DesignPoint
from dse.evaluation import Answers, EvaluationCache, EvaluationResult, ModelEvaluator
from dse.models import LoadedModel
from dse.study.evaluation_quantities import with_evaluation
from dse.trial_record import TrialRecord

__all__ = ["FinalEvaluator", "final_pending", "reevaluate_front", "with_final_values"]

_SAID = ("quantities", "ratios", "accuracy_drop", "graded_drops")
"""Fields of a record that documents fill."""

Front = Callable[[], Sequence[TrialRecord]]


@dataclasses.dataclass(frozen=True)
class FinalEvaluator:
    """Evaluates a trial's point on the fresh documents."""

    loaded: LoadedModel
    bank: FactorBank
    evaluator: ModelEvaluator
    cache: EvaluationCache | None

    def evaluate(self, record: TrialRecord, progress: Callable[[int, int], None]) -> EvaluationResult:
        """The point of a record, from the cache where it is there.

        Raises:
            TrialError: The point cannot be applied or scored.
        """
        point = DesignPoint.from_json(record.point, self.loaded.topology)
        identity = self.evaluator.identity(point.id, self.bank.identity(point))
        answers = Answers() if self.cache is None else self.cache.read(identity)
        with decompose(self.loaded, point, self.bank):
            result = self.evaluator.evaluate(progress, answers=answers)
        if self.cache is not None:
            self.cache.write(identity, answers)
        return result


def reevaluate_front(
    final: FinalEvaluator,
    dense: TrialRecord,
    front: Front,
    found: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None],
    progress: Callable[[int, int], None],
) -> None:
    """Evaluate the front on fresh documents until all of it has been.

    Args:
        final: Evaluates a point.
        dense: The dense model's record.
        front: The trials on the front as it stands, final values counted.
        found: What is known from an earlier run, by trial number.
        keep: Stores what is known after every trial; a kill loses the one in progress.
        progress: Called as requests finish.
    """
    known = dict(found)
    reference = final.evaluate(dense, progress)
    while True:
        waiting = [dense] if str(dense.trial) not in known else []
        waiting += [record for record in front() if str(record.trial) not in known and record.trial != dense.trial]
        if not waiting:
            return
        record = waiting[0]
        result = reference if record.trial == dense.trial else final.evaluate(record, progress)
        known[str(record.trial)] = _entry(record, result, None if record.trial == dense.trial else reference)
        keep(known)


def final_pending(front: Sequence[TrialRecord], found: Mapping[str, Any]) -> bool:
    """Whether a front point still waits for the fresh documents."""
    return any(str(record.trial) not in found for record in front)


def with_final_values(record: TrialRecord, found: Mapping[str, Any]) -> TrialRecord:
    """The record with what the fresh documents said in the place of what the search's said, which it keeps beside."""
    entry = found.get(str(record.trial))
    if entry is None:
        return record
    fresh = TrialRecord.from_json({**record.to_json(), **entry})
    return dataclasses.replace(
        fresh,
        quantities={**record.quantities, **fresh.quantities},
        ratios={**record.ratios, **fresh.ratios},
        search_quantities={name: record.quantities[name] for name in fresh.quantities if name in record.quantities},
        tasks=record.tasks,
    )


def _entry(record: TrialRecord, result: EvaluationResult, dense: EvaluationResult | None) -> dict[str, Any]:
    """What the fresh documents say, as the record's JSON has it."""
    bare = dataclasses.replace(record, quantities={}, ratios={}, graded_drops={}, accuracy_drop=None)
    said = with_evaluation(bare, result, dense).to_json()
    documents = sum(task.documents for task in result.tasks)
    return {**{name: said[name] for name in _SAID}, "final_documents": documents}
