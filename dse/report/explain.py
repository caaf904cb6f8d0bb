"""What a trial's point does and why it was proposed: words, and a map of ranks, layer by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dse.expert_tensor import EXPERT_ROLES
from dse.report.rank_map import OTHER, layer_and_role, rank_map_of, shape_of
from dse.report.units import percent
from dse.search.origins import credited_origins
from dse.trial_record import TrialRecord

if TYPE_CHECKING:
    from dse.study.study import Study

__all__ = ["Explanation", "doings", "explain_trial", "origin_words"]

_ORIGIN_WORDS = {
    "dense": "the model as it is, the reference of all others",
    "enqueued": "asked for by the study file",
    "ladder": "a plain point, what one would try first: one role group at one level in every layer",
    "spread": "a random point from one slice of the reductions, so that the sampler knows them all",
    "sampler": "proposed by the sampler from the trials before it",
    "refined": "a front point with something shifted from one group of tensors to another",
    "allocation": "an exact allocation over the divergences of the sensitivity profile",
    "uniform": "every block at the same share of its parameters, which the search must beat",
    "removal": "whole blocks removed, the limit of rank 0",
    "repaired": "a feasible neighbour of a proposal that broke a limit",
    "retried": "a trial that was interrupted, again",
}


@dataclass(frozen=True)
class Explanation:
    """A trial in words.

    Attributes:
        trial: Its number.
        origin: Who is credited with it.
        lines: Sentences for people: what it is, why it was proposed, what it does, what came of it.
        rank_map: Layer to role to what stands there: a rank, `gone` for a removed block, `.` for dense.
    """

    trial: int
    origin: str
    lines: tuple[str, ...]
    rank_map: Mapping[int, Mapping[str, str]]


def explain_trial(study: Study, trial: int) -> Explanation:
    """Say what a trial's point does and why it was proposed.

    Raises:
        StudyError: There is no such trial, or it is not complete.
    """
    record = study.record(trial)
    origin = credited_origins(study.records, study.objectives)[record.trial]
    standing = "on the front" if record.trial in {r.trial for r in study.front_records} else "not on the front"
    reduction = percent(float(record.cost["reduction"]))
    lines = [
        f"trial {trial}, point {record.point_id}: {reduction} of the parameters removed, {standing}",
        f"origin: {origin_words(origin)}",
    ]
    lines += [f"why: {record.why}"] if record.why else []
    shape = shape_of(study.attributes, study.records)
    ranks = rank_map_of(record, shape)
    lines += [f"what: {sentence}" for sentence in doings(record, shape)]
    lines += [f"result: {_results(study, record)}"]
    return Explanation(trial, origin, tuple(lines), ranks)


def origin_words(origin: str) -> str:
    """`refined (a front point with something shifted from one group of tensors to another)`."""
    return f"{origin} ({_ORIGIN_WORDS.get(origin, 'not known')})"


def doings(record: TrialRecord, shape: Mapping[str, Any]) -> list[str]:
    """One sentence a method, and one on what is left alone."""
    tensors = record.point.get("tensors", {})
    if not tensors:
        return ["nothing is decomposed"]
    sentences = []
    removed = [name for name, choice in tensors.items() if choice["method"] == "removed"]
    if removed:
        sentences.append(f"{_counted(len(removed), 'block is', 'blocks are')} removed: {_listed(removed)}")
    kinds = {(_is_experts(name), choice["method"]) for name, choice in tensors.items()}
    for is_experts, method in sorted(kind for kind in kinds if kind[1] != "removed"):
        own = [
            (name, choice["rank"])
            for name, choice in tensors.items()
            if choice["method"] == method and _is_experts(name) == is_experts
        ]
        ranks = [rank for _, rank in own]
        by_role: dict[str, list[int]] = {}
        for name, rank in own:
            by_role.setdefault(name.rpartition(".")[2], []).append(rank)
        spans = ", ".join(f"{role} {_span(r)} in {_counted(len(r), 'layer')}" for role, r in by_role.items())
        become = (
            f"{_counted(len(own), 'fused expert tensor becomes', 'fused expert tensors become')} cores between shared"
            " factors"
            if is_experts
            else f"{_counted(len(own), 'matrix becomes', 'matrices become')} two factors"
        )
        sentences.append(f"{become} by {method}, rank {_span(ranks)}: {spans}")
    touched = {layer_and_role(name)[0] for name in tensors} - {OTHER}
    left = [layer for layer in range(shape["layers"]) if layer not in touched]
    if left:
        which = ", ".join(map(str, left))
        sentences.append(f"layers {which} stay dense" if len(left) > 1 else f"layer {which} stays dense")
    return sentences


def _results(study: Study, record: TrialRecord) -> str:
    dense = next((r for r in study.records if r.state == "complete" and not r.point["tensors"]), None)
    words = []
    for objective in study.objectives:
        entry = record.quantities.get(objective.name)
        value = record.cost.get(objective.name) if entry is None else entry.value
        if value is None:
            continue
        before = None if dense is None else dense.quantities.get(objective.name)
        base = None if dense is None else dense.cost.get(objective.name) if before is None else before.value
        notes = ["predicted"] if objective.name in record.predicted else []
        notes += [f"dense {base:.5g}"] if base is not None else []
        words.append(f"{objective.name} {value:.5g}" + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(words)


def _is_experts(name: str) -> bool:
    return layer_and_role(name)[1] in EXPERT_ROLES


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _span(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
