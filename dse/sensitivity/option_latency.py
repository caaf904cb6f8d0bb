"""Predicted latencies of a divergence table's options: sums of products as this device times them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from dse.design_point import DesignPoint
from dse.errors import AllocationError
from dse.measurement.device_profile.model_profile import ModelProfile, Phase, SharedInput
from dse.measurement.device_profile.product_timings import ProductShape
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["option_shapes", "with_latencies"]


def option_shapes(table: SensitivityTable, profile: ModelProfile, phase: Phase) -> list[ProductShape]:
    """Every product that `with_latencies` adds up, each once.

    Raises:
        AllocationError: A unit holds what no single product multiplies.
    """
    shapes = dict.fromkeys(profile.shapes(DesignPoint.dense(), phase))
    for unit in table.units:
        groups = _groups(profile, unit)
        for option in unit.options:
            shapes |= dict.fromkeys(profile.shapes_of_groups(groups, DesignPoint(option.choices), phase))
    return list(shapes)


def with_latencies(
    table: SensitivityTable, profile: ModelProfile, phase: Phase, *, dense_s: float | None = None
) -> SensitivityTable:
    """The table with a predicted latency for every option and for the dense model; missing products are timed now.

    An option's latency is what the products of its unit take, all else dense. Blocks have their inputs to themselves,
    so that their sum is exactly `profile.seconds` of the point; where units share an input, as query and key of a layer
    each on its own, the saving of both is taken to be the sum of the savings of each.

    Args:
        table: Of the profile's model.
        profile: Of the device.
        phase: Whose latency.
        dense_s: The dense model's latency where it was measured. Without it the products stand for the whole: what a
            pass needs beside them (attention, norms, starting kernels) is left out, and reductions come out too large.

    Raises:
        AllocationError: A unit holds what no single product multiplies.
        StorageFullError: A timing cannot be kept.
    """
    whole_s = profile.seconds(DesignPoint.dense(), phase) if dense_s is None else dense_s
    taken = profile.pass_time(phase, whole_s)

    def timed(unit: Unit) -> Unit:
        groups = _groups(profile, unit)
        before = _seconds(profile, groups, Option((), 0, 0.0), phase)
        own = sum(_own_share(profile, unit, group) * _seconds(profile, [group], unit.dense, phase) for group in groups)

        def latency_s(option: Option) -> float:
            removed = sum(choice.is_removal for _, choice in option.choices)
            products_s = taken.scale * (own + _seconds(profile, groups, option, phase) - before)
            return products_s - removed * taken.beside_a_block_s

        options = tuple(dataclasses.replace(option, latency_s=latency_s(option)) for option in unit.options)
        return dataclasses.replace(unit, options=options)

    return dataclasses.replace(table, units=tuple(map(timed, table.units)), latency_dense_s=whole_s)


def _groups(profile: ModelProfile, unit: Unit) -> list[SharedInput]:
    groups = profile.groups_of(_tensors(profile, unit.names))
    if groups is None:
        raise AllocationError(
            f"a latency budget needs units of matrices that one product multiplies, but '{unit.name}' holds others"
            " (experts, or tensors that a pass uses more than once); give a budget of parameters"
        )
    return groups


def _tensors(profile: ModelProfile, names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(tensor for name in names for tensor in profile.topology.tensors_of(name)))


def _own_share(profile: ModelProfile, unit: Unit, group: SharedInput) -> float:
    """Share of the unit's tensors in the rows of a group's first product."""
    own = set(_tensors(profile, unit.names))
    rows = {name: profile.topology[name].out_features for name in group.tensors}
    return sum(size for name, size in rows.items() if name in own) / (sum(rows.values()) + group.other_rows)


def _seconds(profile: ModelProfile, groups: list[SharedInput], option: Option, phase: Phase) -> float:
    return sum(map(profile.timings.best_seconds, profile.shapes_of_groups(groups, DesignPoint(option.choices), phase)))
