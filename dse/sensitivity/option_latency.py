"""Predicted latency of each option of a sensitivity table: sums of matrix products as timed on this device."""

from __future__ import annotations

import dataclasses

from dse.design_point import DesignPoint
from dse.errors import AllocationError
from dse.measurement.device_profile import ModelProfile, Phase, ProductShape
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["option_shapes", "with_latencies"]


def option_shapes(table: SensitivityTable, profile: ModelProfile, phase: Phase) -> list[ProductShape]:
    """The shapes of all matrix products that `with_latencies` adds up, each once.

    Raises:
        AllocationError: A unit contains a tensor that is not used by exactly one matrix product.
    """
    shapes = dict.fromkeys(profile.shapes(DesignPoint.dense(), phase))
    for unit in table.units:
        tensors = _tensors(profile, unit)
        for option in unit.options:
            shapes |= dict.fromkeys(profile.shapes(DesignPoint(option.choices), phase, tensors))
    return list(shapes)


def with_latencies(
    table: SensitivityTable, profile: ModelProfile, phase: Phase, *, dense_s: float | None = None
) -> SensitivityTable:
    """The table with a predicted latency for every option and for the dense model; missing products are timed now.

    The latency of an option is the time of its unit's products. The products of one unit do not depend on other units,
    so the sum over units equals `profile.seconds` of the point, minus the products outside all units.

    Args:
        table: Sensitivity table of the profile's model.
        dense_s: Measured latency of the dense model. Without it the sum of the products is used, which leaves out
            attention, norms and kernel launches, so that latency reductions are overestimated.

    Raises:
        AllocationError: A unit contains a tensor that is not used by exactly one matrix product.
        StorageFullError: A timing cannot be stored.
    """
    whole_s = profile.seconds(DesignPoint.dense(), phase) if dense_s is None else dense_s
    taken = profile.pass_time(phase, whole_s)

    def timed(unit: Unit) -> Unit:
        tensors = _tensors(profile, unit)

        def latency_s(option: Option) -> float:
            removed = sum(choice.is_removal for _, choice in option.choices)
            products_s = taken.scale * profile.seconds(DesignPoint(option.choices), phase, tensors)
            return products_s - removed * taken.beside_a_block_s

        options = tuple(dataclasses.replace(option, latency_s=latency_s(option)) for option in unit.options)
        return dataclasses.replace(unit, options=options)

    return dataclasses.replace(table, units=tuple(map(timed, table.units)), latency_dense_s=whole_s)


def _tensors(profile: ModelProfile, unit: Unit) -> list[str]:
    tensors = list(dict.fromkeys(tensor for name in unit.names for tensor in profile.topology.tensors_of(name)))
    if not profile.covers(tensors):
        raise AllocationError(
            f"a latency budget needs units whose matrices are each used by one matrix product, but '{unit.name}' has"
            " others (experts, or tensors that a pass uses more than once); use a budget of parameters"
        )
    return tensors
