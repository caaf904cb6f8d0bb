"""Energy of CPU packages through the Linux kernel's powercap files (RAPL: Intel since 2011, AMD since Zen)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dse.errors import InvalidMeasurementError
from dse.measurement.energy_window import Channel, CounterTrack, EnergyMeter, NoMeterError

__all__ = ["POWERCAP_ROOT", "RaplMeter"]

POWERCAP_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class _Domain:
    name: str
    energy_file: Path
    range_j: float


class RaplMeter(EnergyMeter):
    """Joules of every CPU package: cores, caches and memory controller, whoever used them; not the DRAM, not the board.

    Args:
        root: The kernel's powercap folder.

    Raises:
        NoMeterError: The machine shows no such folder, or its files may not be read; a `MeterUnavailableError` with
            the remedy.
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self._root = root
        self._domains = _package_domains(root)

    @property
    def source(self) -> str:
        """See `EnergyMeter.source`."""
        return "RAPL package counters"

    @property
    def details(self) -> Mapping[str, str]:
        """See `EnergyMeter.details`."""
        return {domain.name: str(domain.energy_file) for domain in self._domains}

    def channels(self) -> tuple[Channel, ...]:
        """See `EnergyMeter.channels`."""
        return tuple(
            Channel(domain.name, partial(_read_j, domain.energy_file), partial(CounterTrack, domain.range_j))
            for domain in self._domains
        )

    def synchronize(self) -> None:
        """See `EnergyMeter.synchronize`. A CPU has finished when the call returns."""


def _package_domains(root: Path) -> tuple[_Domain, ...]:
    """The packages under `root`. Their parts, and their doubles in `intel-rapl-mmio`, are left out."""
    if not root.is_dir():
        reason = f"{root} is not there: not Linux, or a virtual machine whose host does not show its meter"
        raise NoMeterError("rapl", reason, "run on the machine itself, or leave energy out of the objectives")
    domains = []
    for folder in sorted(root.glob("intel-rapl:*")):
        name = (folder / "name").read_text().strip() if (folder / "name").is_file() else ""
        if name.startswith("package"):
            domains.append(_open_domain(folder, name))
    if not domains:
        reason = f"{root} holds no package domain (intel-rapl:*)"
        raise NoMeterError("rapl", reason, "load the driver: `sudo modprobe intel_rapl_msr`")
    return tuple(domains)


def _open_domain(folder: Path, name: str) -> _Domain:
    energy_file = folder / "energy_uj"
    try:
        int(energy_file.read_text())
        return _Domain(name, energy_file, int((folder / "max_energy_range_uj").read_text()) * 1e-6)
    except PermissionError as error:
        # Since 2020 the kernel shows the counters to root alone (CVE-2020-8694).
        reason = f"{energy_file} is not readable for this user"
        raise NoMeterError("rapl", reason, f"run `sudo chmod a+r {energy_file}` (until the next boot)") from error
    except (OSError, ValueError) as error:
        reason = f"{energy_file} cannot be read ({error})"
        raise NoMeterError(
            "rapl", reason, "see whether the kernel's intel_rapl driver works: `dmesg | grep -i rapl`"
        ) from error


def _read_j(energy_file: Path) -> float:
    try:
        return int(energy_file.read_text()) * 1e-6  # microjoules
    except (OSError, ValueError) as error:
        raise InvalidMeasurementError(f"{energy_file} could not be read: {error}") from error
