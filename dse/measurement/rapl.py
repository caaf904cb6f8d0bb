"""Energy of CPU packages and their DRAM through the Linux kernel's powercap files (RAPL: Intel, and AMD since Zen)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dse.measurement.meter import DeviceCondition, EnergyMeter
from dse.measurement.meter_errors import (
    EnergyNotSupportedError,
    MeterPermissionError,
    NoDriverError,
    ReadingFailedError,
)
from dse.measurement.readings import Channel, CounterReadings

__all__ = ["POWERCAP_ROOT", "RaplMeter"]

POWERCAP_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class _Domain:
    name: str
    energy_file: Path
    range_j: float


class RaplMeter(EnergyMeter):
    """Joules of every CPU package (cores, caches, memory controller) and, if reported, of its DRAM.

    A package does not distinguish processes, and the rest of the board is not included. A DRAM domain that reads zero
    is not supported by the processor and is ignored.

    Args:
        root: The kernel's powercap folder.

    Raises:
        NoMeterError: The folder is missing or its files are not readable. The type gives the cause, and the message the
            remedy.
    """

    name = "rapl"
    period_s = 0.001  # Intel's manual (vol. 3B, 15.10.1): "updated at ~1 ms"

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self._domains = _domains(root)
        has_dram = any(domain.name.startswith("dram") for domain in self._domains)
        self.source = "RAPL counters of the packages" + (" and their DRAM" if has_dram else "")
        self.details = {domain.name: str(domain.energy_file) for domain in self._domains}

    def channels(self) -> tuple[Channel, ...]:
        """See `EnergyMeter.channels`."""
        return tuple(
            Channel(domain.name, partial(_read_j, domain.energy_file), partial(CounterReadings, domain.range_j))
            for domain in self._domains
        )

    def conditions(self, window_s: float | None = None) -> tuple[DeviceCondition, ...]:
        """See `EnergyMeter.conditions`; the load average, since packages do not distinguish processes."""
        try:
            load = os.getloadavg()[0]
        except OSError:
            load = None
        return (DeviceCondition("cpu", load_average=load),)


def _domains(root: Path) -> tuple[_Domain, ...]:
    """Packages and their DRAM under `root`.

    Cores and graphics are parts of a package, `psys` contains the packages, and `intel-rapl-mmio` duplicates them. They
    are ignored, so that no joule counts twice.
    """
    if not root.is_dir():
        reason = f"{root} does not exist: not Linux, or a virtual machine whose host does not expose its meter"
        remedy = "run on the physical machine, or remove energy from the objectives"
        raise EnergyNotSupportedError("rapl", reason, remedy)
    domains = []
    for folder in sorted(root.glob("intel-rapl:*")):
        name = (folder / "name").read_text().strip() if (folder / "name").is_file() else ""
        if name == "dram":
            name = f"dram-{folder.name.split(':')[1]}"  # intel-rapl:0:2 belongs to package 0
        if name.startswith(("package", "dram")):
            domain = _open_domain(folder, name)
            if name.startswith("package") or _read_j(domain.energy_file) > 0:
                domains.append(domain)
    if not any(domain.name.startswith("package") for domain in domains):
        reason = f"{root} has no package domain (intel-rapl:*)"
        raise NoDriverError("rapl", reason, "load the driver: `sudo modprobe intel_rapl_msr`")
    return tuple(domains)


def _open_domain(folder: Path, name: str) -> _Domain:
    energy_file = folder / "energy_uj"
    try:
        int(energy_file.read_text())
        return _Domain(name, energy_file, int((folder / "max_energy_range_uj").read_text()) * 1e-6)
    except PermissionError as error:
        # Since 2020 the kernel lets only root read the counters (CVE-2020-8694).
        reason = f"{energy_file} is not readable by this user"
        remedy = f"run `sudo chmod a+r {energy_file}` (until the next boot)"
        raise MeterPermissionError("rapl", reason, remedy) from error
    except (OSError, ValueError) as error:
        reason = f"{energy_file} cannot be read ({error})"
        remedy = "check the kernel's intel_rapl driver: `dmesg | grep -i rapl`"
        raise NoDriverError("rapl", reason, remedy) from error


def _read_j(energy_file: Path) -> float:
    try:
        return int(energy_file.read_text()) * 1e-6  # microjoules
    except (OSError, ValueError) as error:
        raise ReadingFailedError(f"{energy_file} could not be read: {error}") from error
