"""Limits of a space: the reductions they allow, and constraint values of points and measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dse.config import LimitsConfig, Range
from dse.cost import Cost
from dse.topology import Topology

__all__ = ["measured_violations", "reduction_limits", "violations_of_cost"]


def reduction_limits(limits: LimitsConfig, topology: Topology) -> tuple[float, float]:
    """The interval of reductions within the limits on reduction and weight bytes; open ends are infinite."""
    low, high = _ends(limits.reduction)
    lightest, heaviest = _ends(limits.weight_bytes)
    return max(low, _reduction_at(heaviest, topology)), min(high, _reduction_at(lightest, topology))


def _reduction_at(weight_bytes: float, topology: Topology) -> float:
    """The reduction at which the weights take this many bytes."""
    if not math.isfinite(weight_bytes):
        return -weight_bytes
    parameters = (weight_bytes - topology.buffers_bytes) / topology.bytes_per_parameter
    return 1 - parameters / topology.parameters_dense


def violations_of_cost(limits: LimitsConfig, cost: Cost) -> dict[str, float]:
    """Constraint name to its value, <= 0 is feasible: differences of reductions, and bytes relative to the limit."""
    values = {}
    low, high = _ends(limits.reduction)
    if math.isfinite(low):
        values["reduction_min"] = low - cost.reduction
    if math.isfinite(high):
        values["reduction_max"] = cost.reduction - high
    return values | _relative("weight_bytes", limits.weight_bytes, cost.weight_bytes)


def measured_violations(limits: LimitsConfig, quantities: Mapping[str, float]) -> dict[str, float]:
    """Constraint name to its value for limits on measured quantities; quantities that were not measured are skipped."""
    values: dict[str, float] = {}
    for name, limit in limits.measured.items():
        if name in quantities:
            values |= _relative(name, limit, quantities[name])
    return values


def _relative(name: str, limit: Range, value: float) -> dict[str, float]:
    """Values relative to the limit, so that seconds and bytes have comparable scales."""
    values = {}
    if limit.min is not None:
        values[f"{name}_min"] = (limit.min - value) / (abs(limit.min) or 1.0)
    if limit.max is not None:
        values[f"{name}_max"] = (value - limit.max) / (abs(limit.max) or 1.0)
    return values


def _ends(limit: Range) -> tuple[float, float]:
    return (-math.inf if limit.min is None else limit.min, math.inf if limit.max is None else limit.max)
