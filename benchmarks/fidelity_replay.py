"""Trials that early stopping would have stopped in a finished study, and the hypervolume of the remaining front.

    python benchmarks/fidelity_replay.py runs/my_study [--gains 0.002 0.005] [--resume 0.002 0.003] [--fresh 1000]

The study must have run without multi-fidelity evaluation. The same sequence of trials is judged at each `min_gain`, and
the stopped ones once more at each smaller `resume_stopped`, from the stored outcomes, so early stopping causes all of
the difference. Only the proxy (the KL divergence) of each trial is measured now. Cost is counted in documents; the
proxy counts as the number of documents with as many tokens.

Without early stopping the front is chosen from more noisy evaluations, so its hypervolume is biased upwards more
(winner's curse). `--fresh` measures the points of all fronts on documents that the study never saw.

Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dse
from dse.config import FidelityConfig, StudyConfig, load_study
from dse.decomposition import held_out_windows, longest_window
from dse.evaluation import ModelEvaluator, evaluator_for
from dse.evaluation.divergence import DenseDivergence
from dse.pareto import Objective, directions_of, non_dominated, normalised_hypervolume, reference_point
from dse.search.multi_fidelity import PROXY_RUNG, EarlyStopping, MultiFidelitySession
from dse.search.multi_fidelity.estimate import restricted
from dse.study.folder import StudyFolder
from dse.trial_record import EvaluatedTrial, TrialRecord

Setting = tuple[float | None, float | None]
"""`min_gain` (None disables early stopping) and `resume_stopped` (None resumes no trial)."""


def with_proxies(
    records: Sequence[TrialRecord], config: StudyConfig, loaded: dse.LoadedModel, bank: dse.FactorBank, tokens: int
) -> list[TrialRecord]:
    """The records with their KL divergence on this number of held-out tokens."""
    windows = held_out_windows(
        loaded.tokenizer, config.calibration, tokens, longest_window=longest_window(loaded.model)
    )
    meter = DenseDivergence(loaded.model, windows)
    found = []
    for number, record in enumerate(records, 1):
        with dse.decompose(loaded, record.point, bank):
            divergence = meter.of_dense() if record.is_dense else meter.measure()
        quantities = {**record.quantities, "kl_divergence": divergence.interval}
        found.append(dataclasses.replace(record, quantities=quantities))
        print(f"proxy: trial {number} of {len(records)}", file=sys.stderr, flush=True)
    return found


@dataclass(frozen=True)
class Replay:
    """A sequence of finished trials that is judged again.

    Attributes:
        objectives: The study's objectives.
        trials: Its complete trials with their proxies, the baseline first.
        evaluator: Tells which documents belong to a share.
        shares: Shares of the documents at the rungs between the proxy and all documents.
        proxy_documents: Cost of the proxy, in documents.
    """

    objectives: Sequence[Objective]
    trials: Sequence[EvaluatedTrial]
    evaluator: ModelEvaluator
    shares: Sequence[float]
    proxy_documents: float

    def run(self, setting: Setting) -> tuple[float, list[TrialRecord]]:
        """Number of documents evaluated, and the trials that reached the top rung."""
        min_gain, resume_stopped = setting
        if min_gain is None:
            return len(self.trials) * self.documents, [trial.record for trial in self.trials]
        config = FidelityConfig(shares=list(self.shares), min_gain=min_gain, resume_stopped=resume_stopped)
        session = MultiFidelitySession(config, self.objectives, lambda trial: self._by_number[trial].evaluation)
        baseline, spent = self.trials[0], 0.0
        top, stopped = [], {}
        for trial in self.trials:
            rule = None if trial is baseline else session.early_stopping(baseline)
            share, record = self._evaluate(trial, rule)
            spent += share * self.documents + self.proxy_documents
            if record is None:
                session.add(trial.record, trial.evaluation)
                top.append(trial.record)
            else:
                stopped[record.trial] = share, record

        def resume(record: TrialRecord, rule: EarlyStopping) -> None:
            nonlocal spent
            trial, seen = self._by_number[record.trial], stopped[record.trial][0]
            share, still_stopped = self._evaluate(trial, rule)
            spent += max(0.0, share - seen) * self.documents
            if still_stopped is None:
                session.add(trial.record, trial.evaluation)
                top.append(trial.record)

        session.resume_stopped_trials([record for _, record in stopped.values()], baseline, resume)
        return spent, top

    @property
    def documents(self) -> float:
        """Number of documents of all tasks."""
        return float(sum(task.documents for task in self.trials[0].evaluation.tasks))

    @property
    def _by_number(self) -> dict[int, EvaluatedTrial]:
        return {trial.record.trial: trial for trial in self.trials}

    def _evaluate(self, trial: EvaluatedTrial, rule: EarlyStopping | None) -> tuple[float, TrialRecord | None]:
        """Share of the documents that a trial sees, and its record if it is stopped."""
        unseen = {name: value for name, value in trial.record.quantities.items() if name == "kl_divergence"}
        record = dataclasses.replace(trial.record, quantities=unseen, estimates={}, accuracy_drop=None)
        for rung, share in enumerate((0.0, *self.shares) if rule is not None else (), PROXY_RUNG):
            masks = self.evaluator.within_share(share) if share else None
            stop = rule.decide(rung, record, restricted(trial.evaluation, masks) if share else None, masks)
            if stop is not None:
                return share, dataclasses.replace(record, state="stopped", rung=stop.rung, estimates=stop.estimates)
        return 1.0, None

    def front(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Feasible trials that no other one dominates, by the study's own values."""
        records = [record for record in records if record.feasible]
        table = np.asarray([self.values(record) for record in records])
        return [records[index] for index in np.flatnonzero(non_dominated(table, directions_of(self.objectives)))]

    def values(self, record: TrialRecord, accuracies: Mapping[str, float] | None = None) -> list[float]:
        """The objectives of a trial; its accuracy comes from `accuracies` (by point id) if given."""
        fresh = {} if accuracies is None else {"accuracy": accuracies.get(record.point_id)}
        found = [fresh.get(objective.name, record.value(objective.name)) for objective in self.objectives]
        return [math.nan if value is None else float(value) for value in found]

    def hypervolume(self, front: Sequence[TrialRecord], accuracies: Mapping[str, float] | None = None) -> float:
        """Hypervolume relative to the reference point of the baseline."""
        names = [objective.name for objective in self.objectives]
        baseline = dict(zip(names, self.values(self.trials[0].record, accuracies), strict=True))
        reference = reference_point(self.objectives, baseline)
        corner, ideal = [reference[name] for name in names], [o.ideal for o in self.objectives]
        return normalised_hypervolume([self.values(record, accuracies) for record in front], corner, ideal)


def fresh_accuracies(
    config: StudyConfig, loaded: dse.LoadedModel, bank: dse.FactorBank, records: Sequence[TrialRecord], documents: int
) -> dict[str, float]:
    """Point id to accuracy on documents that the study never saw."""
    evaluator = evaluator_for(loaded, config.tasks, config.evaluation, fresh=documents)
    found = {}
    for number, record in enumerate(records, 1):
        with dse.decompose(loaded, record.point, bank):
            found[record.point_id] = evaluator.evaluate().accuracy
        print(f"fresh documents: point {number} of {len(records)}", file=sys.stderr, flush=True)
    return found


def settings_of(gains: Sequence[float], resumes: Sequence[float]) -> list[Setting]:
    """No early stopping, then every `min_gain` with no resuming and with each smaller `resume_stopped`."""
    pairs = [(gain, resume) for gain in gains for resume in (None, *resumes) if resume is None or resume < gain]
    return [(None, None), *pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a study that ran without multi-fidelity evaluation")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.002, 0.003, 0.005], help="values of min_gain")
    parser.add_argument(
        "--resume", type=float, nargs="*", default=[0.001, 0.0015, 0.002, 0.003], help="values of resume_stopped"
    )
    parser.add_argument(
        "--proxy-documents", type=float, default=9.0, help="number of documents with as many tokens as the proxy"
    )
    parser.add_argument("--fresh", type=int, default=0, help="number of new documents on which all fronts are measured")
    options = parser.parse_args()
    config, study, folder = load_study(options.study / "study.yaml"), dse.open_study(options.study), options.study
    complete = sorted((r for r in study.records if r.state == "complete"), key=lambda record: record.trial)
    # Everything is compared with the baseline, which may lie outside the limits of the space.
    records = sorted((r for r in complete if r.feasible or r.is_dense), key=lambda record: not record.is_dense)
    loaded = dse.load_model(config.model.ref, dtype=config.model.dtype)
    windows = dse.calibration_windows(loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model))
    bank = dse.FactorBank.build(loaded, [record.point for record in records], windows)
    defaults, evaluator = FidelityConfig(), evaluator_for(loaded, config.tasks, config.evaluation)
    trials = [
        EvaluatedTrial(record, StudyFolder(folder).read_evaluation(record.trial))
        for record in with_proxies(records, config, loaded, bank, defaults.proxy_tokens)
    ]
    replay = Replay(study.objectives, trials, evaluator, defaults.shares, options.proxy_documents)
    runs = {setting: replay.run(setting) for setting in settings_of(options.gains, options.resume)}
    fronts = {setting: replay.front(top) for setting, (_, top) in runs.items()}
    accuracies = None
    if options.fresh:
        union = {records[0].point_id: records[0]} | {r.point_id: r for front in fronts.values() for r in front}
        accuracies = fresh_accuracies(config, loaded, bank, list(union.values()), options.fresh)
    rows = print_table(replay, runs, fronts, accuracies)
    names = ("kl_divergence", "parameters", "accuracy")
    listed = [{"trial": t.record.trial, **{name: t.record.value(name) for name in names}} for t in trials]
    print(json.dumps({"fresh": options.fresh, "rows": rows, "trials": listed}))


def print_table(
    replay: Replay,
    runs: Mapping[Setting, tuple[float, list[TrialRecord]]],
    fronts: Mapping[Setting, list[TrialRecord]],
    accuracies: Mapping[str, float] | None,
) -> list[dict[str, Any]]:
    """One line per setting; returns the rows for the JSON document."""
    everything: Setting = (None, None)
    rows = []
    print("min_gain resume_stopped   less evaluation   hypervolume            fresh           front   complete")
    for setting, (spent, top) in runs.items():
        gain, resume = setting
        row: dict[str, Any] = {"min_gain": gain, "resume_stopped": resume, "saved": runs[everything][0] / spent}
        row |= {"complete": len(top), "hypervolume": replay.hypervolume(fronts[setting])}
        row["change"] = row["hypervolume"] / replay.hypervolume(fronts[everything]) - 1
        fresh = ""
        if accuracies is not None:
            row["fresh"] = replay.hypervolume(fronts[setting], accuracies)
            row["fresh_change"] = row["fresh"] / replay.hypervolume(fronts[everything], accuracies) - 1
            fresh = f"{row['fresh']:.4f} {100 * row['fresh_change']:+.2f} %"
        print(
            f"{gain or 'none':>8} {resume or '-':>14} {row['saved']:>15.2f} x   {row['hypervolume']:.4f}"
            f" {100 * row['change']:+7.2f} %   {fresh:>16} {len(fronts[setting]):>6} {len(top):>10}",
            flush=True,
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
