"""Latencies in a study's divergence table, predicted from the device profile: allocations then look at time, too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from dse.config import LimitsConfig
from dse.errors import AllocationError
from dse.measurement import device_lock
from dse.pareto import Objective
from dse.sensitivity.option_latency import with_latencies
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.study.measurement_plan import MeasurementPlan
from dse.trial_record import TrialRecord

__all__ = ["LatencyForecast"]

logger = logging.getLogger("dse")


@dataclass(frozen=True)
class LatencyForecast:
    """One latency of a study that predicts latencies, an objective.

    Attributes:
        plan: Holds the device profile and the phases.
        quantity: `decode_latency_s` or `prefill_latency_s`.
        most_s: Its limit; None where it has none.
    """

    plan: MeasurementPlan
    quantity: str
    most_s: float | None = None

    @classmethod
    def of(cls, plan: MeasurementPlan, limits: LimitsConfig, objectives: Sequence[Objective]) -> LatencyForecast | None:
        """What the plan predicts: a limited latency before one that is an objective alone, the first of several.

        None where the study predicts no latency, or has none among its objectives.
        """
        if not plan.predicts_latency or plan.profile is None:
            return None
        latencies = [entry.name for entry in objectives if entry.name in plan.phases()]
        most_s = {name: limit.max for name, limit in limits.measured.items()}
        latencies.sort(key=lambda name: most_s.get(name) is None)  # stable
        return next((cls(plan, name, most_s.get(name)) for name in latencies), None)

    def table(self, table: SensitivityTable, dense: TrialRecord) -> SensitivityTable:
        """The table with latencies predicted from the dense one as measured; as it is where none can be had."""
        measured, profile = dense.quantities.get(self.quantity), self.plan.profile
        if profile is None or measured is None or measured.value is None:
            return table
        try:
            with device_lock(profile.timings.device):  # products that are not timed yet are timed now
                return with_latencies(table, profile, self.plan.phases()[self.quantity], dense_s=measured.value)
        except AllocationError as error:  # the space holds what no single product multiplies
            logger.warning("allocations do not look at %s: %s", self.quantity, error)
            return table
