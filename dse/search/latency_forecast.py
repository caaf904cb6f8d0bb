"""Predicted latencies in a study's sensitivity table, so that allocations trade off time, too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dse.config import LimitsConfig
from dse.errors import AllocationError
from dse.measurement import device_lock
from dse.measurement.device_profile import ModelProfile, Phase
from dse.pareto import Objective
from dse.sensitivity.option_latency import with_latencies
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.trial_record import TrialRecord

__all__ = ["LatencyForecast"]

logger = logging.getLogger("dse")


@dataclass(frozen=True)
class LatencyForecast:
    """Predicts one latency objective from the device profile.

    Attributes:
        profile: The device profile of the model.
        quantity: `decode_latency_s` or `prefill_latency_s`.
        phase: The phase of that latency.
        max_s: The study's limit on it; None without one.
    """

    profile: ModelProfile
    quantity: str
    phase: Phase
    max_s: float | None = None

    @classmethod
    def of(
        cls,
        profile: ModelProfile | None,
        phases: Mapping[str, Phase],
        limits: LimitsConfig,
        objectives: Sequence[Objective],
    ) -> LatencyForecast | None:
        """The forecast of a study that predicts latencies: of the first limited latency objective, else the first one.

        Args:
            profile: The device profile; None if the study predicts no latency.
            phases: Latency quantity to its phase.
        """
        if profile is None:
            return None
        latencies = [objective.name for objective in objectives if objective.name in phases]
        max_s = {name: limit.max for name, limit in limits.measured.items()}
        latencies.sort(key=lambda name: max_s.get(name) is None)  # stable
        return next((cls(profile, name, phases[name], max_s.get(name)) for name in latencies), None)

    def table(self, table: SensitivityTable, baseline: TrialRecord) -> SensitivityTable:
        """The table with predicted latencies, or unchanged if they cannot be predicted."""
        dense_s = baseline.value(self.quantity)
        if dense_s is None:
            return table
        try:
            with device_lock(self.profile.timings.device):  # times the products that have no timing yet
                return with_latencies(table, self.profile, self.phase, dense_s=dense_s)
        except AllocationError as error:  # a part of the space is not a single matrix product
            logger.warning("allocations ignore %s: %s", self.quantity, error)
            return table
