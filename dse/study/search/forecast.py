"""Latencies in a study's damage table, predicted from the device profile: allocations then keep its latency limit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dse.allocation import DamageTable
from dse.config import LimitsConfig
from dse.errors import AllocationError
from dse.measurement import device_lock
from dse.runtime import with_latencies
from dse.study.measurement_plan import MeasurementPlan
from dse.study.record import TrialRecord

__all__ = ["LatencyForecast"]

logger = logging.getLogger("dse")


@dataclass(frozen=True)
class LatencyForecast:
    """One limited latency of a study that predicts latencies.

    Attributes:
        plan: Holds the device profile and the phases.
        quantity: `decode_latency_s` or `prefill_latency_s`.
        most_s: Its limit.
    """

    plan: MeasurementPlan
    quantity: str
    most_s: float

    @classmethod
    def of(cls, plan: MeasurementPlan, limits: LimitsConfig) -> LatencyForecast | None:
        """What the plan can predict of the limits; the first, where both phases have one. None where there is none."""
        if not plan.predicts_latency or plan.profile is None:
            return None
        limited = {name: limit.max for name, limit in limits.measured.items() if name in plan.phases()}
        return next((cls(plan, name, most) for name, most in limited.items() if most is not None), None)

    def table(self, table: DamageTable, dense: TrialRecord) -> DamageTable:
        """The table with latencies predicted from the dense one as measured; as it is where none can be had."""
        measured, profile = dense.quantities.get(self.quantity), self.plan.profile
        if profile is None or measured is None or measured.value is None:
            return table
        try:
            with device_lock(profile.timings.device):  # products that are not timed yet are timed now
                return with_latencies(table, profile, self.plan.phases()[self.quantity], dense_s=measured.value)
        except AllocationError as error:  # the space holds what no single product multiplies
            logger.warning("allocations do not look at the limit of %s: %s", self.quantity, error)
            return table
