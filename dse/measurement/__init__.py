"""Latency, energy and memory of a resident model. Takes models and callables and does not depend on decomposition."""

from dse.measurement.alternation import ModelSwap
from dse.measurement.device_lock import device_in_use, device_lock, passing_measurements
from dse.measurement.doctor import Check, run_checks
from dse.measurement.energy import EnergyResult, EnergySpread, PhaseEnergy, WindowEnergy, measure_energy
from dse.measurement.energy_window import EnergyWindow
from dse.measurement.environment import describe_environment
from dse.measurement.grid import CellLatency, grid_of, measure_cell
from dse.measurement.idle_power import IdlePower, measure_idle_power
from dse.measurement.latency import PairedLatency, PhaseLatency, measure_latency
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.memory import MemoryResult, measure_peak_memory
from dse.measurement.meter import DeviceCondition, EnergyMeter
from dse.measurement.meter_errors import EnergyWindowError, NoMeterError
from dse.measurement.meter_selection import MeterStatus, find_meters, meter_kind, named_meter, open_meter
from dse.measurement.nvml import NvmlMeter
from dse.measurement.paired_energy import EnergyRatio, PairedEnergy, measure_paired_energy
from dse.measurement.rapl import RaplMeter
from dse.measurement.replay import PowerTrace, ReplayMeter
from dse.measurement.timing_statistics import Distribution
from dse.measurement.workload import Workload, check_workload

__all__ = [
    "CellLatency",
    "Check",
    "DeviceCondition",
    "Distribution",
    "EnergyMeter",
    "EnergyRatio",
    "EnergyResult",
    "EnergySpread",
    "EnergyWindow",
    "EnergyWindowError",
    "IdlePower",
    "LatencySpec",
    "MemoryResult",
    "MeterStatus",
    "ModelSwap",
    "NoMeterError",
    "NvmlMeter",
    "PairedEnergy",
    "PairedLatency",
    "PhaseEnergy",
    "PhaseLatency",
    "PowerTrace",
    "RaplMeter",
    "ReplayMeter",
    "WindowEnergy",
    "Workload",
    "check_workload",
    "describe_environment",
    "device_in_use",
    "device_lock",
    "find_meters",
    "grid_of",
    "measure_cell",
    "measure_energy",
    "measure_idle_power",
    "measure_latency",
    "measure_paired_energy",
    "measure_peak_memory",
    "meter_kind",
    "named_meter",
    "open_meter",
    "passing_measurements",
    "run_checks",
]
