"""What the fidelity ladder would have stopped in a study that ran without it, and what its front would be worth.

    python benchmarks/fidelity_replay.py runs/my_study [--gains 0.002 0.005] [--second-looks 0.002 0.003] [--fresh 1000]

One and the same sequence of trials is judged at each `min_gain`, and the stopped ones once more at each `resume_stopped`
below it, from the outcomes that the study kept, so that the difference is the ladder's and nothing else's; the proxy of
each trial is measured now. Evaluation is counted in documents (the proxy as the documents whose tokens it has). The
study without a ladder picks its front from more trials, hence from more luck: with `--fresh` the points of all fronts
are measured on documents that the study never saw, and the fronts are compared by that too. A table for people; one
JSON document as the last line for machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dse
from dse.config import FidelityConfig, StudyConfig, load_study
from dse.decomposition import calibration_windows, held_out_windows, longest_window
from dse.evaluation import EvaluationResult, evaluator_for
from dse.evaluation.divergence import DenseDivergence
from dse.pareto import Objective, directions_of, non_dominated, normalised_hypervolume, reference_point
from dse.search.multi_fidelity.early_stopping import PROXY_RUNG, EarlyStopping
from dse.search.multi_fidelity.established import Established, restricted, value_of
from dse.search.multi_fidelity.resume_stopped import resume_stopped_trials
from dse.study.folder import StudyFolder
from dse.trial_record import Interval, TrialRecord


def with_proxies(
    records: Sequence[TrialRecord], config: StudyConfig, loaded: Any, bank: dse.FactorBank, tokens: int
) -> list[TrialRecord]:
    """The records with the KL divergence on so many held-out tokens."""
    windows = held_out_windows(
        loaded.tokenizer, config.calibration, tokens, longest_window=longest_window(loaded.model)
    )
    meter = DenseDivergence(loaded.model, windows)
    found = []
    for number, record in enumerate(records, 1):
        point = dse.DesignPoint.from_json(record.point, loaded.topology)
        with dse.decompose(loaded, point, bank):
            interval = meter.of_dense().interval if point.is_dense else meter.measure().interval
        proxy = Interval(interval.estimate, interval.low, interval.high)
        found.append(dataclasses.replace(record, quantities={**record.quantities, "kl_divergence": proxy}))
        print(f"proxy: trial {number} of {len(records)}", file=sys.stderr, flush=True)
    return found


@dataclasses.dataclass(frozen=True)
class Replay:
    """One sequence of trials, judged again.

    Attributes:
        objectives: Of the study.
        records: Its complete trials with their proxies, dense first.
        evaluations: Of each, on all documents.
        masks: Share to task to which documents belong to it.
        proxy_documents: What the proxy costs.
    """

    objectives: Sequence[Objective]
    records: Sequence[TrialRecord]
    evaluations: Sequence[EvaluationResult]
    masks: Mapping[float, Mapping[str, NDArray[np.bool_]]]
    proxy_documents: float

    def run(self, min_gain: float | None, resume_stopped: float | None = None) -> tuple[float, list[TrialRecord]]:
        """Documents evaluated, and the trials at the top; None judges nobody, or has no second look."""
        spent, top, stopped = 0.0, [], {}
        for record, evaluation in zip(self.records, self.evaluations, strict=True):
            share, seen = 1.0, None
            if min_gain is not None and top:
                judge = EarlyStopping(self.objectives, top[0], top, min_gain)
                share, seen = self._climbed(record, evaluation, judge)
            spent += share * self.documents + (0.0 if min_gain is None else self.proxy_documents)
            if seen is None:
                top.append(Established(record, evaluation))
            else:
                stopped[record.trial] = share, seen, record, evaluation
        if resume_stopped is None or not stopped:
            return spent, [entry.record for entry in top]

        def climb_on(seen: TrialRecord, judge: EarlyStopping) -> None:
            nonlocal spent
            before, _, record, evaluation = stopped[seen.trial]
            share, still = self._climbed(record, evaluation, judge)
            spent += max(0.0, share - before) * self.documents
            if still is None:
                top.append(Established(record, evaluation))

        waiting = [seen for _, seen, _, _ in stopped.values()]
        resume_stopped_trials(
            waiting, lambda: EarlyStopping(self.objectives, top[0], top, resume_stopped), climb_on, resume_stopped
        )
        return spent, [entry.record for entry in top]

    @property
    def documents(self) -> float:
        """Of all tasks."""
        return float(sum(task.documents for task in self.evaluations[0].tasks))

    def _climbed(
        self, record: TrialRecord, evaluation: EvaluationResult, judge: EarlyStopping
    ) -> tuple[float, TrialRecord | None]:
        """Share of the documents that the trial sees, and its record if it is stopped there."""
        unseen = {name: value for name, value in record.quantities.items() if name == "kl_divergence"}
        before = dataclasses.replace(record, quantities=unseen)
        stop = judge.verdict(PROXY_RUNG, before)
        if stop is not None:
            return 0.0, dataclasses.replace(before, rung=stop.rung, estimates=stop.estimates)
        for rung, (share, masks) in enumerate(self.masks.items(), PROXY_RUNG + 1):
            stop = judge.verdict(rung, before, restricted(evaluation, masks), masks)
            if stop is not None:
                return share, dataclasses.replace(before, rung=stop.rung, estimates=stop.estimates)
        return 1.0, None

    def front(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Feasible trials that no other dominates, by what the study measured."""
        records = [record for record in records if record.feasible]
        table = np.asarray([self.values(record) for record in records])
        return [records[index] for index in np.flatnonzero(non_dominated(table, directions_of(self.objectives)))]

    def values(self, record: TrialRecord, accuracies: Mapping[str, float] | None = None) -> list[float]:
        """The objectives of a record; accuracy from elsewhere, by point, where given."""
        return [
            accuracies[record.point_id]
            if accuracies is not None and objective.name == "accuracy"
            else value_of(objective, record)
            for objective in self.objectives
        ]

    def hypervolume(self, front: Sequence[TrialRecord], accuracies: Mapping[str, float] | None = None) -> float:
        """Against the reference that the dense model gives."""
        dense = dict(zip([o.name for o in self.objectives], self.values(self.records[0], accuracies), strict=True))
        reference = reference_point(self.objectives, dense)
        corner, ideal = [reference[o.name] for o in self.objectives], [o.ideal for o in self.objectives]
        return normalised_hypervolume([self.values(record, accuracies) for record in front], corner, ideal)


def on_fresh_documents(
    config: StudyConfig, loaded: Any, bank: dse.FactorBank, records: Sequence[TrialRecord], documents: int
) -> dict[str, float]:
    """Accuracy of these points on documents that the study never saw."""
    evaluator = evaluator_for(loaded, config.tasks, config.evaluation, fresh=documents)
    found = {}
    for number, record in enumerate(records, 1):
        with dse.decompose(loaded, dse.DesignPoint.from_json(record.point, loaded.topology), bank):
            found[record.point_id] = evaluator.evaluate().accuracy
        print(f"fresh documents: point {number} of {len(records)}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a study that ran without a ladder")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.002, 0.003, 0.005])
    parser.add_argument("--second-looks", type=float, nargs="*", default=[0.001, 0.0015, 0.002, 0.003])
    parser.add_argument(
        "--proxy-documents", type=float, default=9.0, help="whose tokens the proxy has: 9 of ARC-Easy's"
    )
    parser.add_argument("--fresh", type=int, default=0, help="documents that all fronts are measured on")
    options = parser.parse_args()
    config = load_study(options.study / "study.yaml")
    study = dse.open_study(options.study)
    complete = sorted((r for r in study.records if r.state == "complete"), key=lambda record: record.trial)
    # The dense model removes nothing, so that it breaks the space's limits; everything is judged against it.
    records = [record for record in complete if record.feasible or not record.point["tensors"]]
    folder = StudyFolder(options.study)
    loaded = dse.load_model(config.model.ref, dtype=config.model.dtype)
    windows = calibration_windows(loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model))
    points = [dse.DesignPoint.from_json(record.point, loaded.topology) for record in records]
    bank = dse.FactorBank.build(loaded, points, windows)
    evaluator = evaluator_for(loaded, config.tasks, config.evaluation)
    ladder = FidelityConfig()
    evaluations = [folder.read_evaluation(record.trial) for record in records]
    replay = Replay(
        study.objectives,
        with_proxies(records, config, loaded, bank, ladder.proxy_tokens),
        evaluations,
        {share: evaluator.within_share(share) for share in ladder.shares},
        options.proxy_documents,
    )
    pairs = [(gain, second) for gain in options.gains for second in (None, *options.second_looks)]
    pairs = [(None, None), *((gain, second) for gain, second in pairs if second is None or second < gain)]
    runs = {pair: replay.run(*pair) for pair in pairs}
    fronts = {pair: replay.front(top) for pair, (_, top) in runs.items()}
    unjudged = None, None
    accuracies = None
    if options.fresh:
        union = {record.point_id: record for front in fronts.values() for record in front}
        union.setdefault(records[0].point_id, records[0])
        accuracies = on_fresh_documents(config, loaded, bank, list(union.values()), options.fresh)
    rows = []
    print("least gain, second look   less evaluation   hypervolume            fresh           front   at the top")
    for (gain, second), (spent, top) in runs.items():
        row: dict[str, Any] = {"min_gain": gain, "resume_stopped": second, "saved": runs[unjudged][0] / spent}
        row |= {"top": len(top), "hypervolume": replay.hypervolume(fronts[gain, second])}
        row["change"] = row["hypervolume"] / replay.hypervolume(fronts[unjudged]) - 1
        fresh = ""
        if accuracies is not None:
            row["fresh"] = replay.hypervolume(fronts[gain, second], accuracies)
            row["fresh_change"] = row["fresh"] / replay.hypervolume(fronts[unjudged], accuracies) - 1
            fresh = f"{row['fresh']:.4f} {100 * row['fresh_change']:+.2f} %"
        print(
            f"{gain or 'none':>10} {second or '-':>12} {row['saved']:>17.2f} x   {row['hypervolume']:.4f}"
            f" {100 * row['change']:+7.2f} %   {fresh:>16} {len(fronts[gain, second]):>6} {len(top):>8}",
            flush=True,
        )
        rows.append(row)
    trials = [
        {
            "trial": record.trial,
            "kl_divergence": record.quantities["kl_divergence"].value,
            "parameters": record.cost["parameters"],
            "accuracy": record.quantities["accuracy"].value,
        }
        for record in replay.records
    ]
    print(json.dumps({"fresh": options.fresh, "rows": rows, "trials": trials}))


if __name__ == "__main__":
    main()
