"""What is wrong with a running study, each as a sentence with its remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dse.pareto.objective import Objective
from dse.report.dashboard.progress_plot import ProposerShare, proposer_shares
from dse.report.dashboard.snapshot import StudySnapshot
from dse.report.dashboard.trial_groups import groups_of
from dse.report.trials_table import numbers
from dse.report.units import percent
from dse.report.worker_lanes import is_alive
from dse.trial_record import EVALUATED_STATES, TrialRecord

__all__ = ["CHANCE", "Notice", "health_of"]

CHANCE: Mapping[str, float] = {
    "dse_grammar": 0.5,
    "dse_facts": 0.25,
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "boolq": 0.5,
    "commonsense_qa": 0.2,
    "copa": 0.5,
    "hellaswag": 0.25,
    "mmlu": 0.25,
    "openbook_qa": 0.25,
    "openbookqa": 0.25,
    "piqa": 0.5,
    "rte": 0.5,
    "sciq": 0.25,
    "social_iqa": 1 / 3,
    "truthfulqa_mc1": 0.22,
    "winogrande": 0.5,
    "wsc273": 0.5,
}
"""Accuracy of guessing on well-known tasks; a record does not say how many choices a task has."""

_WANTED_DROP = 0.02
"""The tolerance that `dse recommend` uses by default."""
_WITHOUT_GAIN = 10
_CONVERGED = 25
_REPEATED = 3
_Z = 1.959963984540054
_SWITCHES = {
    "refined": "set `search: {refinement: false}` to give its trials to the others",
    "allocation": "set `search: {refit: false}` to give its trials to the others",
    "sampler": "choose another sampler (`sampler: {name: ...}`), or a smaller space",
}


@dataclass(frozen=True)
class Notice:
    """One finding.

    Attributes:
        level: `problem` if trials are being lost or invalid, `warning` if the study answers less than it could, `note`
            otherwise.
        what: What was found, one sentence.
        remedy: What to do about it.
    """

    level: Literal["problem", "warning", "note"]
    what: str
    remedy: str


def health_of(snapshot: StudySnapshot, now_s: float) -> list[Notice]:
    """All findings, the most serious first."""
    found = [
        *_workers(snapshot, now_s),
        *_failures(snapshot),
        *_throttling(snapshot),
        *_noise(snapshot),
        *_chance(snapshot),
        *_proposers(snapshot),
    ]
    order = ("problem", "warning", "note")
    return sorted(found, key=lambda notice: order.index(notice.level))


def _workers(snapshot: StudySnapshot, now_s: float) -> Iterator[Notice]:
    for lane in snapshot.lanes:
        if lane.failures_in_a_row >= _REPEATED:
            reason = f" The last reason: {lane.last_failure[:160]}." if lane.last_failure else ""
            yield Notice(
                "problem",
                f"{lane.worker} has failed {lane.failures_in_a_row} trials in a row.{reason}",
                _failure_remedy(lane.last_failure),
            )
        if lane.state != "ended" and not is_alive(lane, now_s) and not snapshot.is_complete:
            where = f" on {lane.host}" if lane.host else ""
            yield Notice(
                "problem",
                f"{lane.worker}{where} no longer runs, but the study is not complete.",
                f"Continue it with `dse run {snapshot.directory}/study.yaml --out {snapshot.directory}`. Finished"
                " trials are kept; the one in flight is repeated.",
            )


def _failures(snapshot: StudySnapshot) -> Iterator[Notice]:
    """Failed trials in a row at the end of a study whose workers do not tell."""
    if any(lane.failures_in_a_row >= _REPEATED for lane in snapshot.lanes):
        return
    last: list[TrialRecord] = []
    for record in sorted(snapshot.records.values(), key=lambda r: -r.trial):
        if record.state in EVALUATED_STATES:
            if record.state != "failed":
                break
            last.append(record)
    if len(last) >= _REPEATED:
        reason = last[0].reason
        yield Notice(
            "problem",
            f"The last {len(last)} trials have all failed. The last reason: {reason[:160]}.",
            _failure_remedy(reason),
        )


def _failure_remedy(reason: str) -> str:
    if "memory" in reason.lower():
        return "Lower `evaluation.batch_size`, or free memory on the device; then run the study again."
    if "throttled" in reason or "other processes" in reason:
        return "Keep other work off the device, or let it cool; then run the study again."
    return "Read `run.log` in the study's folder; `dse doctor` checks the device and its meter."


def _throttling(snapshot: StudySnapshot) -> Iterator[Notice]:
    """Devices that were throttled in the last trials."""
    recent = [record for _, record in sorted(snapshot.records.items())][-20:]
    found: dict[str, set[str]] = {}
    trials: dict[str, set[int]] = {}
    for record in recent:
        for condition in _conditions(record.energy):
            limits = condition.get("throttled_by") or ()
            if limits:
                device = str(condition.get("device"))
                found.setdefault(device, set()).update(map(str, limits))
                trials.setdefault(device, set()).add(record.trial)
    for device, limits in found.items():
        count = len(trials[device])
        yield Notice(
            "problem",
            f"{device} was throttled in {count} of the last {len(recent)} trials ({', '.join(sorted(limits))}): its"
            " clocks fell during the measurement.",
            "Improve its cooling, or lock the clocks below the limit (`nvidia-smi -lgc`), so that every trial runs at"
            " the same clock.",
        )


def _conditions(entry: Any) -> Iterable[Mapping[str, Any]]:
    """Conditions of devices anywhere in the record of a measurement."""
    if isinstance(entry, Mapping):
        if "throttled_by" in entry:
            yield entry
        for value in entry.values():
            yield from _conditions(value)
    elif isinstance(entry, (list, tuple)):
        for value in entry:
            yield from _conditions(value)


def _noise(snapshot: StudySnapshot) -> Iterator[Notice]:
    """Intervals that are too wide to tell front points apart, or to certify the usual tolerance."""
    table = snapshot.trials
    if table.empty:
        return
    if (notice := _accuracy_noise(snapshot)) is not None:
        yield notice
    front = groups_of(table)["front"]
    for objective in snapshot.objectives:
        if not objective.is_cost or f"{objective.name}_ratio" not in table.columns:
            continue
        notice = _cost_noise(
            objective, *(numbers(table, f"{objective.name}_ratio{e}")[front] for e in ("", "_low", "_high"))
        )
        if notice is not None:
            yield notice


def _accuracy_noise(snapshot: StudySnapshot) -> Notice | None:
    table = snapshot.trials
    detectable = numbers(table, "accuracy_drop_detectable")
    documents = numbers(table, "accuracy_drop_documents")
    known = np.isfinite(detectable) & np.isfinite(documents)
    if not known.any():
        return None
    smallest, count = float(np.median(detectable[known])), int(np.max(documents[known]))
    if smallest <= _WANTED_DROP:
        return None
    needed = math.ceil(count * (smallest / _WANTED_DROP) ** 2 / 10) * 10
    return Notice(
        "warning",
        f"The noise is too large for small drops: {count:,} documents detect an accuracy drop of"
        f" {100 * smallest:.1f} points, not one of {100 * _WANTED_DROP:.0f}.",
        f"Evaluate about {needed:,} documents in all (raise `evaluation.limit` or add tasks), or confirm the front with"
        " `fidelity: {final_documents: ...}`.",
    )


def _cost_noise(objective: Objective, ratio: np.ndarray, low: np.ndarray, high: np.ndarray) -> Notice | None:
    known = np.isfinite(ratio) & np.isfinite(low) & np.isfinite(high)
    if known.sum() < 3:
        return None
    reach, saving = float(np.median((high - low)[known] / 2)), float(np.median(np.abs(1.0 - ratio[known])))
    if reach <= 0.5 * saving:
        return None
    energy = "energy" in objective.name
    key = "energy_precision" if energy else "precision"
    return Notice(
        "warning",
        f"The noise of {objective.label.lower()} is as large as what the front saves: intervals of"
        f" ±{100 * reach:.1f} % beside a median saving of {percent(saving)}.",
        f"Keep other work off the device, or set a smaller `measurement.{key}`, so that more is measured per trial.",
    )


def _chance(snapshot: StudySnapshot) -> Iterator[Notice]:
    """Tasks on which the dense model guesses: no decomposition can be judged by them."""
    dense = next((r for r in snapshot.records.values() if r.is_dense and r.state == "complete"), None)
    if dense is None:
        return
    for task, result in dense.tasks.items():
        chance = CHANCE.get(task)
        value = next((entry for name, entry in result["metrics"].items() if name.partition(",")[0] == "acc"), None)
        if chance is None or value is None or value[0] is None or value[1] is None:
            continue
        if value[0] - _Z * value[1] <= chance:
            yield Notice(
                "warning",
                f"Task {task} is at chance: {result['documents']} documents do not tell the dense model's"
                f" {percent(value[0])} from the {percent(chance)} of guessing.",
                "Leave the task out or choose an easier one: what the model cannot do, a decomposition cannot damage.",
            )


def _proposers(snapshot: StudySnapshot) -> Iterator[Notice]:
    shares = proposer_shares(snapshot)
    recent = snapshot.steps[-_CONVERGED:]
    if len(recent) == _CONVERGED and len(snapshot.steps) > _CONVERGED and sum(step.gained for step in recent) == 0:
        if not snapshot.is_complete:
            yield Notice(
                "note",
                f"The last {_CONVERGED} trials added nothing to the hypervolume.",
                "The front may be complete: stop the study with Ctrl-C, or widen the space.",
            )
        return
    for share in shares:
        if _gains_nothing(share, shares):
            yield Notice(
                "note",
                f"Proposer {share.origin} gained nothing in its last {share.since_gain} evaluations, while the others"
                " still gain.",
                f"It keeps a small share of the trials; {_SWITCHES.get(share.origin, 'no action is needed')}.",
            )


def _gains_nothing(share: ProposerShare, shares: Iterable[ProposerShare]) -> bool:
    others = sum(other.gained_recently for other in shares if other.origin != share.origin)
    return share.since_gain >= _WITHOUT_GAIN and share.origin in _SWITCHES and others > 0
