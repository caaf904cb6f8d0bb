"""Evaluate the front on final documents, which the search never saw.

The best of many noisy evaluations is biased upwards (winner's curse), and evaluating the same documents again would
repeat the bias. So the final documents are new ones. Their results replace those of the search; a point that leaves the
front makes room for others, which are evaluated in turn, until every point on the front is confirmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dse.decomposition import FactorBank, decompose
from dse.evaluation import Answers, EvaluationCache, EvaluationResult, ModelEvaluator
from dse.measurement import device_in_use
from dse.models import LoadedModel
from dse.trial.rungs import with_evaluation
from dse.trial_record import TrialRecord

__all__ = ["FinalEvaluator", "final_pending", "reevaluate_front", "with_final_values"]

_FROM_DOCUMENTS = ("quantities", "ratios", "accuracy_drop", "graded_drops")
"""Fields of a record that are measured on documents."""


@dataclasses.dataclass(frozen=True)
class FinalEvaluator:
    """Evaluates points on the final documents."""

    loaded: LoadedModel
    bank: FactorBank
    evaluator: ModelEvaluator
    cache: EvaluationCache | None

    def evaluate(self, record: TrialRecord, progress: Callable[[int, int], None]) -> EvaluationResult:
        """Evaluate the point of a record; answers in the cache are reused.

        Raises:
            TrialError: The point cannot be applied or scored.
        """
        identity = self.evaluator.identity(record.point_id, self.bank.identity(record.point))
        answers = Answers() if self.cache is None else self.cache.read(identity)
        with device_in_use(self.loaded.device), decompose(self.loaded, record.point, self.bank):
            result = self.evaluator.evaluate(progress, answers=answers)
        if self.cache is not None:
            self.cache.write(identity, answers)
        return result


def reevaluate_front(
    evaluate: Callable[[TrialRecord], EvaluationResult],
    baseline: TrialRecord,
    front: Callable[[], Sequence[TrialRecord]],
    found: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Evaluate the front on the final documents until every point on it has been evaluated.

    Args:
        evaluate: Evaluates the point of a record on the final documents.
        baseline: The dense model's record.
        front: Returns the trials on the front, with the final values so far.
        found: Results of an earlier run, by trial number.
        keep: Stores the results after every trial; a kill loses at most the trial in progress.
    """
    known = dict(found)
    reference = evaluate(baseline)
    while True:
        waiting = [baseline] if str(baseline.trial) not in known else []
        waiting += [record for record in front() if str(record.trial) not in known and record.trial != baseline.trial]
        if not waiting:
            return
        record = waiting[0]
        is_baseline = record.trial == baseline.trial
        result = reference if is_baseline else evaluate(record)
        known[str(record.trial)] = _entry(record, result, None if is_baseline else reference)
        keep(known)


def final_pending(front: Sequence[TrialRecord], found: Mapping[str, Any]) -> bool:
    """Whether a point on the front has not been evaluated on the final documents yet."""
    return any(str(record.trial) not in found for record in front)


def with_final_values(record: TrialRecord, found: Mapping[str, Any]) -> TrialRecord:
    """The record with its results on the final documents, if any; `search_quantities` keeps those of the search."""
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


def _entry(record: TrialRecord, result: EvaluationResult, baseline: EvaluationResult | None) -> dict[str, Any]:
    """The results on the final documents, as JSON of a record's fields."""
    bare = dataclasses.replace(record, quantities={}, ratios={}, graded_drops={}, accuracy_drop=None)
    found = with_evaluation(bare, result, baseline).to_json()
    documents = sum(task.documents for task in result.tasks)
    return {**{name: found[name] for name in _FROM_DOCUMENTS}, "final_documents": documents}
