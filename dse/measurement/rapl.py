"""Energy of CPU packages and their DRAM through the Linux kernel's powercap files (RAPL: Intel, and AMD since Zen)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dse.measurement.faults import EnergyNotSupportedError, MeterPermissionError, NoDriverError, ReadingFailedError
from dse.measurement.meter import DeviceCondition, EnergyMeter
from dse.measurement.track import Channel, CounterTrack

__all__ = ["POWERCAP_ROOT", "RaplMeter"]

POWERCAP_ROOT = Path("/sys/class/powercap")

_PERIOD_S = 0.001  # Intel's manual (vol. 3B, 15.10.1): "updated at ~1 ms"


@dataclass(frozen=True)
class _Domain:
    name: str
    energy_file: Path
    range_j: float


class RaplMeter(EnergyMeter):
    """Joules of every CPU package (cores, caches, memory controller) and, where it is told, of its DRAM.

    Whoever used them: a package does not tell one process from another. The rest of the board is not in it, and a DRAM
    domain that shows zero is one that the processor does not serve.

    Args:
        root: The kernel's powercap folder.

    Raises:
        NoMeterError: The machine shows no such folder, or its files may not be read; the type says which, and the
            message the remedy.
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self._domains = _domains(root)

    @property
    def source(self) -> str:
        """See `EnergyMeter.source`."""
        has_dram = any(domain.name.startswith("dram") for domain in self._domains)
        return "RAPL counters of the packages and their DRAM" if has_dram else "RAPL counters of the packages"

    @property
    def details(self) -> Mapping[str, str]:
        """See `EnergyMeter.details`."""
        return {domain.name: str(domain.energy_file) for domain in self._domains}

    @property
    def period_s(self) -> float | None:
        """See `EnergyMeter.period_s`."""
        return _PERIOD_S

    def channels(self) -> tuple[Channel, ...]:
        """See `EnergyMeter.channels`."""
        return tuple(
            Channel(domain.name, partial(_read_j, domain.energy_file), partial(CounterTrack, domain.range_j))
            for domain in self._domains
        )

    def conditions(self) -> tuple[DeviceCondition, ...]:
        """See `EnergyMeter.conditions`: the load of the machine, for the packages cannot tell processes apart."""
        try:
            load = os.getloadavg()[0]
        except OSError:
            load = None
        return (DeviceCondition("cpu", load_average=load),)

    def synchronize(self) -> None:
        """See `EnergyMeter.synchronize`. A CPU has finished when the call returns."""


def _domains(root: Path) -> tuple[_Domain, ...]:
    """Packages and their DRAM under `root`.

    Cores and graphics are parts of a package, `psys` holds the packages, and `intel-rapl-mmio` doubles them: all left
    out, or the same joule would count twice.
    """
    if not root.is_dir():
        reason = f"{root} is not there: not Linux, or a virtual machine whose host does not show its meter"
        remedy = "run on the machine itself, or leave energy out of the objectives"
        raise EnergyNotSupportedError("rapl", reason, remedy)
    domains = []
    for folder in sorted(root.glob("intel-rapl:*")):
        name = (folder / "name").read_text().strip() if (folder / "name").is_file() else ""
        if name == "dram":
            name = f"dram-{folder.name.split(':')[1]}"  # of intel-rapl:0:2 that of package 0
        if name.startswith(("package", "dram")):
            domain = _open_domain(folder, name)
            if name.startswith("package") or _read_j(domain.energy_file) > 0:
                domains.append(domain)
    if not any(domain.name.startswith("package") for domain in domains):
        reason = f"{root} holds no package domain (intel-rapl:*)"
        raise NoDriverError("rapl", reason, "load the driver: `sudo modprobe intel_rapl_msr`")
    return tuple(domains)


def _open_domain(folder: Path, name: str) -> _Domain:
    energy_file = folder / "energy_uj"
    try:
        int(energy_file.read_text())
        return _Domain(name, energy_file, int((folder / "max_energy_range_uj").read_text()) * 1e-6)
    except PermissionError as error:
        # Since 2020 the kernel shows the counters to root alone (CVE-2020-8694).
        reason = f"{energy_file} is not readable for this user"
        remedy = f"run `sudo chmod a+r {energy_file}` (until the next boot)"
        raise MeterPermissionError("rapl", reason, remedy) from error
    except (OSError, ValueError) as error:
        reason = f"{energy_file} cannot be read ({error})"
        remedy = "see whether the kernel's intel_rapl driver works: `dmesg | grep -i rapl`"
        raise NoDriverError("rapl", reason, remedy) from error


def _read_j(energy_file: Path) -> float:
    try:
        return int(energy_file.read_text()) * 1e-6  # microjoules
    except (OSError, ValueError) as error:
        raise ReadingFailedError(f"{energy_file} could not be read: {error}") from error
