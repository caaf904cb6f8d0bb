"""What a trial's point does and why it was proposed: words, and a map of ranks, layer by role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dse.pareto.units import percent
from dse.study.record import TrialRecord
from dse.study.search.origins import credited_origins

if TYPE_CHECKING:
    from dse.study.study import Study

__all__ = ["Explanation", "explain_trial", "rank_map_text"]

_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_DENSE, _GONE = ".", "gone"
_ORIGIN_WORDS = {
    "dense": "the model as it is, the reference of all others",
    "enqueued": "asked for by the study file",
    "ladder": "a plain point, what one would try first: one role group at one level in every layer",
    "spread": "a random point from one slice of the reductions, so that the sampler knows them all",
    "sampler": "proposed by the sampler from the trials before it",
    "refined": "a front point with something shifted from one group of tensors to another",
    "allocation": "an exact allocation over the damages of the sensitivity profile",
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
        f"origin: {origin} ({_ORIGIN_WORDS.get(origin, 'not known')})",
    ]
    lines += [f"why: {record.why}"] if record.why else []
    shape = study.attributes.get("facts", {}).get("shape") or _shape_of(study.records)
    ranks = rank_map_of(record, shape)
    lines += [f"what: {sentence}" for sentence in _doings(record, shape)]
    lines += [f"result: {_results(study, record)}"]
    return Explanation(trial, origin, tuple(lines), ranks)


def rank_map_of(record: TrialRecord, shape: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """What stands at each layer and role."""
    columns = [*shape["roles"]]
    found: dict[int, dict[str, str]] = {layer: dict.fromkeys(columns, _DENSE) for layer in range(shape["layers"])}
    for name, choice in record.point.get("tensors", {}).items():
        matched = _NAME.fullmatch(name)
        layer, role = (int(matched[1]), matched[2]) if matched else (-1, name)
        row = found.setdefault(layer, dict.fromkeys(columns, _DENSE))
        if choice["method"] == "removed":
            row.update(dict.fromkeys(shape["blocks"].get(role, [role]), _GONE))
        else:
            row.update(dict.fromkeys(shape["stacks"].get(role, [role]), str(choice["rank"])))
    return dict(sorted(found.items()))


def rank_map_text(ranks: Mapping[int, Mapping[str, str]]) -> list[str]:
    """The map as lines of text, one a layer; `.` is dense, `gone` a removed block, a number the rank."""
    columns = list(dict.fromkeys(role for row in ranks.values() for role in row))
    width = max([6, *(len(role) for role in columns)])
    lines = ["layer " + " ".join(f"{role:>{width}}" for role in columns)]
    for layer, row in ranks.items():
        named = "other" if layer < 0 else str(layer)
        lines.append(f"{named:>5} " + " ".join(f"{row.get(role, _DENSE):>{width}}" for role in columns))
    return lines


def _doings(record: TrialRecord, shape: Mapping[str, Any]) -> list[str]:
    """One sentence a method, and one on what is left alone."""
    tensors = record.point.get("tensors", {})
    if not tensors:
        return ["nothing is decomposed"]
    sentences = []
    removed = [name for name, choice in tensors.items() if choice["method"] == "removed"]
    if removed:
        sentences.append(f"{len(removed)} blocks are removed: {_listed(removed)}")
    for method in sorted({choice["method"] for choice in tensors.values()} - {"removed"}):
        own = [(name, choice["rank"]) for name, choice in tensors.items() if choice["method"] == method]
        ranks = [rank for _, rank in own]
        by_role: dict[str, list[int]] = {}
        for name, rank in own:
            by_role.setdefault(name.rpartition(".")[2], []).append(rank)
        spans = ", ".join(f"{role} {min(r)}-{max(r)} in {len(r)} layers" for role, r in by_role.items())
        sentences.append(
            f"{len(own)} matrices become two factors by {method}, ranks {min(ranks)} to {max(ranks)}: {spans}"
        )
    touched = {int(matched[1]) for name in tensors if (matched := _NAME.fullmatch(name))}
    left = [layer for layer in range(shape["layers"]) if layer not in touched]
    if left:
        sentences.append(f"layers {', '.join(map(str, left))} stay dense")
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
        words.append(f"{objective.name} {value:.5g}" + (f" (dense {base:.5g})" if base is not None else ""))
    return ", ".join(words)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _shape_of(records: Sequence[TrialRecord]) -> dict[str, Any]:
    """Layers and roles as far as the points of an older study name them."""
    parts = [m for record in records for name in record.point.get("tensors", {}) if (m := _NAME.fullmatch(name))]
    roles = list(dict.fromkeys(matched[2] for matched in parts))
    return {"layers": 1 + max((int(m[1]) for m in parts), default=-1), "roles": roles, "blocks": {}, "stacks": {}}
