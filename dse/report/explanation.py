"""Explanation of a trial in words: why its point was proposed, what it changes, and its results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dse.design_point import PIVOTED, DesignPoint
from dse.expert_tensor import EXPERT_ROLES
from dse.pareto.objective import Objective
from dse.report.rank_map import OUTSIDE_LAYERS, ModelShape, layer_and_role, rank_map_of, shape_of
from dse.report.units import number_ranges, percent
from dse.search.origins import credited_origins
from dse.trial_record import TrialRecord

__all__ = ["Explanation", "TrialContext", "changes_text", "explain_trial", "origin_text"]

_ORIGINS = {
    "dense": "the unmodified model, the baseline of all other trials",
    "enqueued": "requested by the user",
    "ladder": "uniform start-up point: one role group at one rank level in every layer",
    "spread": "random start-up point from one slice of the range of reductions",
    "sampler": "proposed by the Optuna sampler from the trials before it",
    "refined": "a front point with rank moved from one group of tensors to another",
    "allocation": "exact allocation of ranks over the measured sensitivities",
    "uniform": "every block reduced to the same fraction of its parameters, as a reference for the search",
    "removal": "whole blocks removed, the limit of rank 0",
    "repaired": "a feasible neighbour of a proposal that broke a limit of the space",
    "retried": "repetition of an interrupted trial",
}
_MAX_LISTED = 8


@dataclass(frozen=True)
class TrialContext:
    """The study's data that an explanation needs besides the trial's own record.

    Attributes:
        objectives: The study's objectives.
        shape: Layout of the model.
        origins: Trial to the origin credited with it.
        front: Trials on the front.
        baseline: Record of the dense model; None if it is not complete.
    """

    objectives: Sequence[Objective]
    shape: ModelShape
    origins: Mapping[int, str]
    front: Collection[int]
    baseline: TrialRecord | None

    @classmethod
    def of(
        cls,
        records: Sequence[TrialRecord],
        objectives: Sequence[Objective],
        facts: Mapping[str, Any],
        front: Collection[int],
    ) -> TrialContext:
        """Build the context from a study's records, objectives, stored facts and front trials."""
        shape = shape_of(facts, [record.point for record in records])
        baseline = next((record for record in records if record.state == "complete" and record.is_dense), None)
        return cls(objectives, shape, credited_origins(records, objectives), front, baseline)


@dataclass(frozen=True)
class Explanation:
    """A trial in words.

    Attributes:
        trial: Trial number.
        origin: The origin credited with it.
        lines: Sentences: the point, why it was proposed, what it changes, and the results.
        rank_map: Layer to role to rank (see `rank_map_of`).
    """

    trial: int
    origin: str
    lines: tuple[str, ...]
    rank_map: Mapping[int, Mapping[str, str]]


def explain_trial(record: TrialRecord, context: TrialContext) -> Explanation:
    """Explain why a trial's point was proposed and what it changes, with its results."""
    origin = context.origins[record.trial]
    standing = "on the front" if record.trial in context.front else "not on the front"
    lines = [
        f"trial {record.trial}, point {record.point_id}: {percent(float(record.cost['reduction']))} of the parameters"
        f" removed, {standing}",
        f"origin: {origin_text(origin)}",
    ]
    lines += [f"why: {record.why}"] if record.why else []
    lines += [f"what: {sentence}" for sentence in changes_text(record.point, context.shape)]
    lines += [f"result: {_results(record, context)}"]
    return Explanation(record.trial, origin, tuple(lines), rank_map_of(record.point, context.shape))


def origin_text(origin: str) -> str:
    """`refined (a front point with rank moved from one group of tensors to another)`."""
    return f"{origin} ({_ORIGINS.get(origin, 'unknown')})"


def changes_text(point: DesignPoint, shape: ModelShape) -> list[str]:
    """One sentence per method, and one on the layers that stay dense."""
    if point.is_dense:
        return ["nothing is decomposed"]
    sentences = []
    removed = point.removed
    if removed:
        sentences.append(f"{_count(len(removed), 'block is', 'blocks are')} removed: {_listed(removed)}")
    if point.widths:
        kept = list(point.widths.values())
        verb = "keeps" if len(kept) == 1 else "each keep"
        sentences.append(f"{_count(len(kept), 'MLP')} {verb} {_span(kept)} channels: {_listed(list(point.widths))}")
    groups: dict[tuple[bool, str], list[tuple[str, int]]] = {}
    for name, choice in point.decomposed:
        role = layer_and_role(name)[1]
        groups.setdefault((role in EXPERT_ROLES, choice.title), []).append((role, choice.rank))
    for (is_experts, method), own in sorted(groups.items()):
        by_role: dict[str, list[int]] = {}
        for role, rank in own:
            by_role.setdefault(role.rpartition(".")[2], []).append(rank)
        spans = ", ".join(f"{role} {_span(r)} in {_count(len(r), 'layer')}" for role, r in by_role.items())
        parts = _count(len(own), "fused expert tensor") if is_experts else _count(len(own), "matrix", "matrices")
        factors = "a core tensor between shared factors" if is_experts else "two factors"
        if method.startswith(PIVOTED):
            factors = "independent rows or columns and combinations of them"
        each = "each " if len(own) > 1 else ""
        verb = "is" if len(own) == 1 else "are"
        sentences.append(
            f"{parts} {verb} {each}replaced by {factors} ({method}, rank {_span([rank for _, rank in own])}): {spans}"
        )
    touched = {layer_and_role(name)[0] for name, _ in point} - {OUTSIDE_LAYERS}
    dense = [layer for layer in range(shape["layers"]) if layer not in touched]
    if dense:
        numbers = number_ranges(dense)
        sentences.append(f"layers {numbers} stay dense" if len(dense) > 1 else f"layer {numbers} stays dense")
    return sentences


def _results(record: TrialRecord, context: TrialContext) -> str:
    results = []
    for objective in context.objectives:
        value = record.value(objective.name)
        if value is None:
            continue
        base = None if context.baseline is None else context.baseline.value(objective.name)
        notes = ["predicted"] if objective.name in record.predicted else []
        notes += [f"dense {base:.5g}"] if base is not None else []
        results.append(f"{objective.name} {value:.5g}" + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(results)


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _span(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
