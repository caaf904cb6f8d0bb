"""The points of a study's front as pictures for its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dse.report.explain import doings, origin_words
from dse.report.point_map import MapCell, PointMap
from dse.report.rank_map import OTHER, Placed, placed_choices, rank_map_of, rank_map_text, shape_of
from dse.report.units import percent
from dse.search.origins import credited_origins
from dse.trial_record import TrialRecord

if TYPE_CHECKING:
    from dse.study.study import Study

__all__ = ["point_maps"]


def point_maps(study: Study) -> tuple[PointMap, ...]:
    """Every point of the front that decomposes something, in the order of the front's table."""
    shape = shape_of(study.attributes, study.records)
    origins = credited_origins(study.records, study.objectives)
    order = {int(trial): place for place, trial in enumerate(study.front()["trial"])} if study.records else {}
    records = [record for record in study.front_records if record.point.get("tensors")]
    records.sort(key=lambda record: order.get(record.trial, len(order)))
    return tuple(_map(record, shape, origins[record.trial]) for record in records)


def _map(record: TrialRecord, shape: Mapping[str, Any], origin: str) -> PointMap:
    ranks, placed = rank_map_of(record, shape), placed_choices(record, shape)
    roles = tuple(dict.fromkeys(role for row in ranks.values() for role in row))
    inside = {(layer, role) for layer in ranks if layer != OTHER for role in shape["roles"]}
    cells = tuple(tuple(_cell(placed.get((layer, role)), (layer, role) in inside) for layer in ranks) for role in roles)
    notes = [f"Origin: {origin_words(origin)}."]
    notes += [f"Why: {record.why}."] if record.why else []
    notes += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in doings(record, shape)]
    return PointMap(
        record.trial,
        f"Trial {record.trial}: {percent(float(record.cost['reduction']))} of the parameters removed",
        tuple(notes),
        tuple("other" if layer == OTHER else str(layer) for layer in ranks),
        roles,
        cells,
        tuple(rank_map_text(ranks)),
    )


def _cell(placed: Placed | None, exists: bool) -> MapCell | None:
    if placed is None:
        return MapCell() if exists else None
    stack = placed.name if placed.is_stack else ""
    return MapCell(placed.choice.method, placed.choice.rank, placed.kept, stack)
