"""Latency, energy and memory of a resident model. Takes models and callables; knows nothing of decomposition."""

from dse.measurement.device_lock import device_in_use, device_lock
from dse.measurement.distribution import Distribution
from dse.measurement.doctor import Check, run_checks
from dse.measurement.energy import EnergyResult, MeterStatus, PhaseEnergy, find_meters, measure_energy, open_meter
from dse.measurement.energy_window import EnergyMeter, EnergyWindow, NoMeterError
from dse.measurement.environment import describe_environment
from dse.measurement.latency import LatencySpec, PairedLatency, PhaseLatency, measure_latency
from dse.measurement.memory import MemoryResult, measure_peak_memory
from dse.measurement.nvml import NvmlMeter
from dse.measurement.rapl import RaplMeter

__all__ = [
    "Check",
    "Distribution",
    "EnergyMeter",
    "EnergyResult",
    "EnergyWindow",
    "LatencySpec",
    "MemoryResult",
    "MeterStatus",
    "NoMeterError",
    "NvmlMeter",
    "PairedLatency",
    "PhaseEnergy",
    "PhaseLatency",
    "RaplMeter",
    "describe_environment",
    "device_in_use",
    "device_lock",
    "find_meters",
    "measure_energy",
    "measure_latency",
    "measure_peak_memory",
    "open_meter",
    "run_checks",
]
